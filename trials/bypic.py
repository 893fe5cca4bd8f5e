import sys; sys.path.insert(0,".")
import torch, random
from models.tiny_grid import *
from transformers import AutoProcessor
m=sys.argv[1]
proc=AutoProcessor.from_pretrained(m); model=Qwen2VLForConditionalGeneration.from_pretrained(m).eval()
rng=random.Random("x"); convs=[conversation(8,rng) for _ in range(48)]
x=encode(convs,proc); 
with torch.no_grad(): g=model(**x).logits[:,:-1].argmax(-1)
lab=x["labels"][:,1:]; eos=proc.tokenizer.eos_token_id
for k in range(8):
    acc={}
    for c,gg,ll in zip(convs,g,lab):
        pos=0; toks=[(a.item(),b.item()) for a,b in zip(gg,ll) if b!=-100]
        segs=[];cur=[]
        for a,b in toks:
            if b==eos: segs.append(cur);cur=[]
            else: cur.append(a==b)
        acc.setdefault(c[2*k]["content"][1]["text"],[]).append(segs[k])
    print(k,{q[:14]:[round(sum(s[i] for s in v)/len(v),2) for i in range(len(v[0]))] for q,v in acc.items()})
