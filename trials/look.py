"""success of a checkpoint on held-out boards, with pictures and with gray; whole conversations, no server
   look.py MODEL [boards]"""
import os, sys; os.environ.setdefault("OMP_WAIT_POLICY","passive"); sys.path.insert(0,".")
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from envs.grid import *
torch.set_num_threads(1); torch.manual_seed(0)
proc=AutoProcessor.from_pretrained(sys.argv[1]); proc.tokenizer.padding_side="left"
model=Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[1],dtype=torch.float32).eval()
bad=[model.config.image_token_id,model.config.video_token_id]
n=int(sys.argv[2]) if len(sys.argv)>2 else 100
for gray in (False,True):
    env=load_environment(num_eval=n,gray=gray); rows=[env.eval[i] for i in range(n)]
    talks=[list(r["prompt"]) for r in rows]; live=list(range(n)); first=None
    while live:
        texts=[proc.apply_chat_template(talks[i],add_generation_prompt=True) for i in live]
        images=[m["content"][0]["image"] for i in live for m in talks[i] if m["role"]=="user"]
        x=proc(text=texts,images=images,padding=True,return_tensors="pt")
        with torch.no_grad(): out=model.generate(**x,do_sample=True,top_k=0,top_p=1.0,temperature=1.0,max_new_tokens=4,bad_words_ids=[[b] for b in bad])
        said=proc.tokenizer.batch_decode(out[:,x["input_ids"].shape[1]:],skip_special_tokens=True)
        nxt=[]
        for i,s in zip(live,said):
            talks[i].append({"role":"assistant","content":s})
            new=env.reply(talks[i],"",**rows[i]["info"])
            if new: talks[i]+=new; nxt.append(i)
        live=nxt
    comps=[[m["content"] for m in t if m["role"]=="assistant"] for t in talks]
    won=[reached(c,"",**r["info"]) for c,r in zip(comps,rows)]
    print("gray" if gray else "seen",sum(won)/n,"moves",sum(map(len,comps))/n,flush=True)
