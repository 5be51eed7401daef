"""One step of tuning after rounding, as PyTorch's users would write it: for the time, next to `ostq-convert --tune`.

    python3 benches/tune-torch.py MODEL cuda|cpu STEPS [THREADS]

MODEL is a checkpoint folder of the LLaMA family, of which only config.json is read: weights are random. Every matrix, the
embedding and the head have Q4_0's parameters: latent codes and a scale per 32 values with straight-through rounding, and
norms; the loss is the full KL divergence from the float model, whose forward pass is part of the step; eight windows of
512 tokens; f32 throughout (no TF32), Adam with beta 0.9 and 0.95. Prints seconds per step, the first five left out.
"""
import json, sys, time
import torch
import torch.nn.functional as F

folder, device, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
if len(sys.argv) > 4:
    torch.set_num_threads(int(sys.argv[4]))
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(1)
c = json.load(open(f"{folder}/config.json"))
n, ff, layers, vocab = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
hd, eps, batch, length = n // heads, c["rms_norm_eps"], 8, 512


class Rounded(torch.nn.Module):
    """Q4_0 as parameters."""

    def __init__(self, rows, columns):
        super().__init__()
        self.float = torch.randn(rows, columns, device=device) / columns**0.5
        blocks = self.float.view(rows, columns // 32, 32)
        d = blocks.abs().amax(-1, keepdim=True) / 8
        self.d = torch.nn.Parameter(d.clone())
        self.t = torch.nn.Parameter((blocks / d).clamp(-8.45, 7.45))

    def weight(self):
        codes = self.t + (self.t.round().clamp(-8, 7) - self.t).detach()
        d = self.d + (self.d.half().float() - self.d).detach()
        return (codes * d).view(self.float.shape)


shapes = {"q": (n, n), "k": (kv * hd, n), "v": (kv * hd, n), "o": (n, n), "gate": (ff, n), "up": (ff, n), "down": (n, ff)}
matrices = [{k: Rounded(*s) for k, s in shapes.items()} for _ in range(layers)]
norms = [[torch.nn.Parameter(torch.ones(n, device=device)) for _ in range(2)] for _ in range(layers)]
last_norm = torch.nn.Parameter(torch.ones(n, device=device))
embedding, head = Rounded(vocab, n), Rounded(vocab, n)
angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, hd, 2) / hd)).to(device)
cos, sin = angles.cos()[None, None], angles.sin()[None, None]


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotate(x):
    a, b = x[..., : hd // 2], x[..., hd // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def forward(tokens, of):
    x = F.embedding(tokens, of(embedding))
    for m, (first, second) in zip(matrices, norms):
        h = norm(x, first if of is student else first.detach())
        split = lambda y, count: y.view(batch, length, count, hd).transpose(1, 2)
        q, k, v = (split(h @ of(m[i]).T, heads if i == "q" else kv) for i in "qkv")
        k, v = (y.repeat_interleave(heads // kv, 1) for y in (rotate(k), v))
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(batch, length, n) @ of(m["o"]).T
        h = norm(x, second if of is student else second.detach())
        x = x + (F.silu(h @ of(m["gate"]).T) * (h @ of(m["up"]).T)) @ of(m["down"]).T
    return norm(x, last_norm if of is student else last_norm.detach()) @ of(head).T


student = lambda r: r.weight()
teacher = lambda r: r.float
all_rounded = [embedding, head] + [r for m in matrices for r in m.values()]
codes, rest = [r.t for r in all_rounded], [r.d for r in all_rounded] + [w for p in norms for w in p] + [last_norm]
adam = torch.optim.Adam([{"params": codes, "lr": 2e-3}, {"params": rest, "lr": 1e-5}], betas=(0.9, 0.95))
times = []
for step in range(steps + 5):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.time()
    tokens = torch.randint(vocab, (batch, length), device=device)
    with torch.no_grad():
        p = F.log_softmax(forward(tokens, teacher), -1)
    loss = F.kl_div(F.log_softmax(forward(tokens, student), -1), p, log_target=True, reduction="sum") / (batch * length)
    adam.zero_grad()
    loss.backward()
    adam.step()
    value = loss.item()
    times.append(time.time() - start)
times = sorted(times[5:])
print(f"PyTorch {torch.__version__}, {device}: {times[len(times) // 2]:.4f} s per step (median of {steps}), loss {value:.4f}")
