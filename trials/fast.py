"""history-free RL on one look per state and step: all states forwarded once"""
import os, sys, random, time
os.environ.setdefault("OMP_WAIT_POLICY","passive")
sys.path.insert(0,".")
import torch
from envs.grid import *
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
opt=dict(model="w1",P=16,G=16,turns=6,steps=100,lr=1e-4,size=3,question="Which way from red to green?",cost=0.02,std=0,shape=0.0,clip=0.1,seed=0,say=0,b2=0.999,mindist=1,every=10,warm=0,wd=0.0)
for a in sys.argv[1:]:
    k,v=a.split("="); opt[k]=type(opt[k])(v)
O=type("O",(),opt); print(sys.argv[1:],flush=True)
torch.set_num_threads(1); torch.manual_seed(O.seed)
proc=AutoProcessor.from_pretrained(O.model); tok=proc.tokenizer
model=Qwen2VLForConditionalGeneration.from_pretrained(O.model,dtype=torch.float32).eval()
pad=tok.convert_tokens_to_ids("<|image_pad|>")
text=f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"+"<|image_pad|>"*O.size**2+f"<|vision_end|>{O.question}<|im_end|>\n<|im_start|>assistant\n"
names=[*MOVES]
def cname(c): return "abcdefgh"[c[0]]+str(c[1]+1)
cells=[(i,j) for i in range(O.size) for j in range(O.size)]
states=[(a,g) for a in cells for g in cells if a!=g]; S={s:i for i,s in enumerate(states)}
pre=" " if O.say else ""
mv=[tok.encode(pre+m)[0] for m in names]
nxt=torch.full((len(states),4),-1)
for s,i in S.items():
    for j,m in enumerate(names):
        b=step(Board(O.size,*s),m)
        nxt[i,j]=-1 if b.agent==b.goal else S[(b.agent,b.goal)]
full=[text+(f"{cname(a)} {cname(g)}" if O.say else "") for a,g in states]
I=torch.tensor([tok(t)["input_ids"] for t in full])
def logp(rng):
    f=proc.image_processor(images=[draw(Board(O.size,*s),rng) for s in states],return_tensors="pt")
    lg=model(input_ids=I,mm_token_type_ids=(I==pad).int(),**f,logits_to_keep=1).logits[:,-1]
    return lg[:,mv].log_softmax(-1)
dist=torch.tensor([abs(a[0]-g[0])+abs(a[1]-g[1]) for a,g in states])
starts_ok=(dist>=O.mindist).nonzero()[:,0]
def rollout(lp,start):
    n=len(start); s=start.clone(); alive=torch.ones(n,dtype=torch.bool); rew=torch.zeros(n); won=torch.zeros(n); log=[]
    for t in range(O.turns):
        idx=alive.nonzero()[:,0]
        if not len(idx): break
        a=torch.distributions.Categorical(logits=lp[s[idx]]).sample()
        log.append((idx,s[idx],a)); rew[idx]-=O.cost
        q=nxt[s[idx],a]; w=q<0; won[idx[w]]=1; rew[idx[w]]+=1; alive[idx[w]]=False; s[idx[~w]]=q[~w]
        if O.shape: d=torch.where(w,0,dist[q.clamp(min=0)]); rew[idx]+=O.shape*(dist[log[-1][1]]-d)
    return log,rew,won
optim=torch.optim.AdamW(model.parameters(),lr=O.lr,weight_decay=O.wd,betas=(0.9,O.b2))
rng=random.Random(O.seed); t0=time.time(); hist=[]; cum=[]
for k in range(O.steps+1):
    for gr in optim.param_groups: gr["lr"]=O.lr*min(1,(k+1)/max(1,O.warm))
    lp=logp(rng); 
    st=starts_ok[torch.randint(len(starts_ok),(O.P,))].repeat_interleave(O.G)
    with torch.no_grad(): log,rew,won=rollout(lp,st)
    r=rew.view(O.P,O.G); adv=r-r.mean(1,keepdim=True)
    if O.std: adv=adv/(r.std(1,keepdim=True,correction=0)+1e-4)
    adv=adv.view(-1); W=torch.zeros(len(states),4); N=torch.zeros(len(states))
    for idx,s,a in log: W.index_put_((s,a),adv[idx],accumulate=True); N.index_add_(0,s,torch.ones(len(s)))
    ntok=2*N.sum(); optim.zero_grad(); (-(W*lp).sum()/ntok).backward()
    g=torch.nn.utils.clip_grad_norm_(model.parameters(),O.clip); optim.step()
    hist.append(won.mean().item()); cum.append(int(N.sum()))
    if k%O.every==0:
        ent=(-(lp.exp()*lp).sum(1)*N).sum()/N.sum()
        print(k,f"cum {sum(cum)} won {sum(hist[-O.every:])/len(hist[-O.every:]):.3f} ent {ent:.3f} g {g:.3f} moves {int(N.sum())} {time.time()-t0:.0f}s",flush=True)
