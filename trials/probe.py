"""supervised probes. usage: probe.py key=value"""
import os, sys, random, time, json
os.environ.setdefault("OMP_WAIT_POLICY","passive")
sys.path.insert(0,".")
import torch
from envs.grid import *
import models.tiny_qwen2_vl as base
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
opt=dict(every=100,task="places", hid=64, vdim=64, vheads=4, vdepth=2, layers=2, heads=4, kv=2, inter=256, steps=600, batch=64, lr=2e-3, size=3, turns=4, init=0.1, seed=0, threads=1, rel=0.0, dir=0.0, save="", grad="none", wd=0.0, vratio=2, clip=1.0, theta=10.0, ramp=0, question="Which way from red to green?", qs=4, move=0.2, mrope="")
for a in sys.argv[1:]:
    k,v=a.split("="); opt[k]=type(opt[k])(v)
O=type("O",(),opt); print(opt,flush=True)
torch.manual_seed(O.seed); torch.set_num_threads(O.threads)
ROWS=["top","middle","bottom"] if O.size==3 else ["first","second","third","fourth"]
COLS=["west","center","east"] if O.size==3 else ["west","inner","outer","east"]
QUESTION=O.question
if O.ramp:
    def draw(board, rng):
        side = board.size * CELL
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        down=Image.linear_gradient("L").resize((side,side)); across=down.rotate(90)
        a,b,c=(rng.randint(-30,30) for _ in range(3))
        ground=Image.merge("RGB",(across.point(lambda v: 60+v*140//255+a),Image.new("L",(side,side),128+b),down.point(lambda v: 60+v*140//255+c)))
        image = Image.blend(ground, noise, 0.25)
        pen = ImageDraw.Draw(image)
        for cell, color in ((board.goal, GREEN), (board.agent, RED)):
            outline = rng.choice([pen.rectangle, pen.ellipse])
            width = rng.randint(16, 24)
            left, top = (CELL * place + rng.randint(0, CELL - width) for place in cell)
            fill = tuple(channel + rng.randint(-30, 30) for channel in color)
            outline((left, top, left + width - 1, top + width - 1), fill=fill)
        return image
    draw(deal(3,random.Random(1)),random.Random(1)).resize((300,300),0).save("ramp.png")
TEXT=["system\nYou are a helpful assistant.","user\n","assistant\n",QUESTION,"Where is red?","Where is green?","Is green left of red?","Is green right of red?","Is green above red?","Is green below red?","Where is green from red?","north","south","west","east",*MOVES,"yes","no",
 *[f"{r} {c}" for r in ROWS for c in COLS], *ROWS,*COLS]

proc=base.make_processor(TEXT); tok=proc.tokenizer
for w in [*MOVES,"yes","no"," ".join([ROWS[0],COLS[0]])]: print(w,tok.encode(w))
print(len(tok), len(tok.encode(QUESTION)), len(tok.encode("Where is red?")))
ids=tok.get_vocab()
head=O.hid//O.heads
sec={16:[2,3,3],32:[4,6,6],24:[4,4,4]}[head]
if O.mrope: sec=[int(x) for x in O.mrope.split("-")]
text={"vocab_size":len(tok),"hidden_size":O.hid,"intermediate_size":O.inter,"num_hidden_layers":O.layers,"num_attention_heads":O.heads,"num_key_value_heads":O.kv,"max_position_embeddings":4096,"initializer_range":O.init,"bos_token_id":None,"eos_token_id":tok.eos_token_id,"pad_token_id":tok.pad_token_id,"rope_parameters":{"rope_type":"default","rope_theta":O.theta,"mrope_section":sec}}
vision={"depth":O.vdepth,"embed_dim":O.vdim,"num_heads":O.vheads,"mlp_ratio":O.vratio,"hidden_size":O.hid,"initializer_range":O.init}
cfg=Qwen2VLConfig(text_config=text,vision_config=vision,tie_word_embeddings=True,dtype="float32",image_token_id=ids["<|image_pad|>"],video_token_id=ids["<|video_pad|>"],vision_start_token_id=ids["<|vision_start|>"],vision_end_token_id=ids["<|vision_end|>"])
model=Qwen2VLForConditionalGeneration(cfg); model.train()
print(sum(p.numel() for p in model.parameters()),flush=True)
def optimal(b):
    dx,dy=b.goal[0]-b.agent[0],b.goal[1]-b.agent[1]
    return [m for m,(x,y) in MOVES.items() if (x and x*dx>0) or (y and y*dy>0)]
def place(c): return "abcd"[c[0]]+str(c[1]+1)
def qa(b,rng):
    t=O.task
    if t=="policy": return "move",QUESTION,rng.choice(optimal(b))
    u=rng.random()
    if u<O.move: return "move",QUESTION,rng.choice([*MOVES])
    if u<O.move+O.rel:
        k=rng.randrange(4); w=["left of","right of","above","below"][k]
        dx,dy=b.goal[0]-b.agent[0],b.goal[1]-b.agent[1]
        return "rel",f"Is green {w} red?","yes" if [dx<0,dx>0,dy<0,dy>0][k] else "no"
    if u<O.move+O.rel+O.dir:
        return "dir","Where is green from red?",dict(left="west",right="east",up="north",down="south")[rng.choice(optimal(b))]
    who=rng.choice(["red","green"])
    return who,f"Where is {who}?",place(b.agent if who=="red" else b.goal)
IMG=O.size**2
def conversation(rng):
    images=[];text="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n";kinds=[];
    T=rng.randint(1,O.turns) if O.turns>1 else 1
    T=O.turns
    b=deal(O.size,rng)
    pieces=[(text,0)]
    for t in range(T):
        images.append(draw(b,rng))
        for n in range(O.qs):
            k,q,a=qa(b,rng)
            pic="<|vision_start|>"+"<|image_pad|>"*IMG+"<|vision_end|>" if n==0 else ""
            pieces.append((f"<|im_start|>user\n{pic}{q}<|im_end|>\n<|im_start|>assistant\n",0))
            pieces.append((a+"<|im_end|>",k)); pieces.append(("\n",0))
        b=step(b,rng.choice([*MOVES]))
        if b.agent==b.goal: b=deal(O.size,rng)
    return pieces,images
cache={}
def enc(s):
    if s not in cache: cache[s]=tok.encode(s,add_special_tokens=False)
    return cache[s]
def batch(rng,n):
    rows=[];imgs=[]
    for _ in range(n):
        p,im=conversation(rng); imgs+=im
        i=[];l=[];kk=[]
        for s,k in p:
            e=enc(s); i+=e; l+=e if k else [-100]*len(e); kk+=[k or ""]*len(e)
        rows.append((i,l,kk))
    L=max(len(r[0]) for r in rows)
    inp=torch.full((n,L),tok.pad_token_id); lab=torch.full((n,L),-100); att=torch.zeros(n,L,dtype=torch.long)
    for j,(i,l,_) in enumerate(rows):
        inp[j,:len(i)]=torch.tensor(i); lab[j,:len(i)]=torch.tensor(l); att[j,:len(i)]=1
    f=proc.image_processor(images=imgs,return_tensors="pt")
    mm=(inp==ids["<|image_pad|>"]).int()
    return dict(input_ids=inp,attention_mask=att,mm_token_type_ids=mm,**f),lab,[r[2] for r in rows]
def evaluate(n=128):
    model.eval(); rng=random.Random("heldout"); x,lab,kk=batch(rng,n)
    with torch.no_grad(): lg=model(**x).logits
    pred=lg[:,:-1].argmax(-1); tgt=lab[:,1:]
    acc={}
    for j in range(n):
        for t in range(tgt.shape[1]):
            if tgt[j,t]!=-100 and tgt[j,t]!=tok.eos_token_id:
                acc.setdefault(kk[j][t+1],[]).append((pred[j,t]==tgt[j,t]).item())
    model.train(); return {k:round(sum(v)/len(v),3) for k,v in acc.items()}
optim=torch.optim.AdamW(model.parameters(),lr=O.lr,weight_decay=O.wd)
sched=torch.optim.lr_scheduler.OneCycleLR(optim,O.lr,O.steps)
rng=random.Random(O.seed); t0=time.time(); td=0
for s in range(O.steps):
    a=time.time(); x,lab,_=batch(rng,O.batch); td+=time.time()-a
    loss=model(**x,labels=lab).loss
    optim.zero_grad(); loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(),O.clip)
    optim.step(); sched.step()
    if s==0: print("L",x["input_ids"].shape)
    if s%O.every==0 or s==O.steps-1: print(s,round(loss.item(),3),evaluate(),f"{time.time()-t0:.0f}s data {td:.0f}s",flush=True)
if O.save:
    model.save_pretrained(O.save); proc.save_pretrained(O.save)
