"""One step of learning rotations and scales, as PyTorch's users would write it: for the time, next to `ostq-convert learn`.

    python3 benches/learn-torch.py MODEL cuda|cpu STEPS [THREADS]

MODEL is a checkpoint folder of the LLaMA family, of which only config.json is read: weights are random. The rotation of the
stream and those of values step on the orthogonal group (Cayley, Adam on the skew part of the gradient), five scales by layer by
their logarithms; every matrix of the layers is made from them in each step and rounded to four bits by row, clipped where it
errs least of sixteen, straight-through with the scale in the graph; the loss is KL-Top over 1000 words against the float model,
whose forward pass is part of the step; four windows of 512 tokens; f32 throughout (no TF32), the Cayley map in f64. Prints
seconds per step, the first five left out. Next to it: `ostq-convert learn MODEL --for w4a16 --steps 30 --batch 4`.
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
hd, eps, batch, length = n // heads, c["rms_norm_eps"], 4, 512
group = heads // kv

shapes = {"q": (n, n), "k": (kv * hd, n), "v": (kv * hd, n), "o": (n, n), "gate": (ff, n), "up": (ff, n), "down": (n, ff)}
random = lambda rows, columns: torch.randn(rows, columns, device=device) / columns**0.5
matrices = [{k: random(*s) for k, s in shapes.items()} for _ in range(layers)]
embedding, head = random(vocab, n), random(vocab, n)
orthogonal = lambda k: torch.linalg.qr(torch.randn(k, k, device=device, dtype=torch.float64))[0]


class Rotation:
    def __init__(self, *size):
        self.r = torch.stack([orthogonal(size[-1]) for _ in range(size[0])])
        self.single = self.r.float().requires_grad_()
        self.m, self.v = torch.zeros_like(self.r), torch.zeros_like(self.r)

    @torch.no_grad()
    def step(self, at, rate):
        g = self.single.grad.double() @ self.r.mT
        g = 0.5 * (g - g.mT)
        self.m.mul_(0.9).add_(g, alpha=0.1)
        self.v.mul_(0.999).addcmul_(g, g, value=0.001)
        b = 0.5 * rate * (self.m / (1 - 0.9**at)) / ((self.v / (1 - 0.999**at)).sqrt() + 1e-14)
        one = torch.eye(b.shape[-1], device=device, dtype=b.dtype)
        self.r = torch.linalg.solve(one + b, (one - b) @ self.r)
        self.single.copy_(self.r)
        self.single.grad = None


stream, values = Rotation(1, n), [Rotation(kv, hd) for _ in range(layers)]
widths = {"attn": n, "ffn": n, "ov": kv * hd, "qk": kv * hd // 2, "ud": ff}
logs = [{k: torch.zeros(w, device=device, requires_grad=True) for k, w in widths.items()} for _ in range(layers)]
adam = torch.optim.Adam([s for l in logs for s in l.values()], lr=0.01)
angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, hd, 2) / hd)).to(device)
cos, sin = angles.cos()[None, None], angles.sin()[None, None]


def rounded(w):
    with torch.no_grad():
        most, best, where = w.abs().amax(-1, keepdim=True), None, None
        for i in range(16):
            d = most / 7 * (1 - i * 0.5 / 15)
            error = (((w / d).round().clamp(-8, 7) * d - w) ** 2).sum(-1, keepdim=True)
            where = d if best is None else torch.where(error < best, d, where)
            best = error if best is None else torch.minimum(error, best)
        part = where / most
    d = w.abs().amax(-1, keepdim=True) * part
    q = w / d
    return (q + (q.round().clamp(-8, 7) - q).detach()) * d


def layer(l):
    """The weights as rotations and scales make them, rounded."""
    m, s, R, V = matrices[l], {k: v.exp() for k, v in logs[l].items()}, stream.single[0], values[l].single
    pair = lambda count: torch.cat([s["qk"].view(kv, 1, hd // 2)] * 2, -1).expand(kv, count, hd).reshape(-1, 1)
    read = lambda w, by: (w @ R) * by
    v = read(m["v"], s["attn"]) / s["ov"][:, None]
    v = torch.einsum("hij,hik->hjk", V, v.view(kv, hd, n)).reshape(kv * hd, n)
    o = (m["o"] * s["ov"].view(kv, 1, hd).expand(kv, group, hd).reshape(-1)).view(n, kv, group, hd)
    o = torch.einsum("rkgi,kij->rkgj", o, V).reshape(n, n)
    made = {
        "q": read(m["q"], s["attn"]) / pair(group),
        "k": read(m["k"], s["attn"]) * pair(1),
        "v": v,
        "o": R.T @ o,
        "gate": read(m["gate"], s["ffn"]),
        "up": read(m["up"], s["ffn"]) / s["ud"][:, None],
        "down": R.T @ (m["down"] * s["ud"]),
    }
    return {k: rounded(w) for k, w in made.items()}, 1 / s["attn"], 1 / s["ffn"]


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotate(x):
    a, b = x[..., : hd // 2], x[..., hd // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def forward(tokens, student):
    x = F.embedding(tokens, embedding)
    x = x @ stream.single[0] if student else x
    for l in range(layers):
        w, first, second = layer(l) if student else (matrices[l], 1.0, 1.0)
        h = norm(x, first)
        split = lambda y, count: y.view(batch, length, count, hd).transpose(1, 2)
        q, k, v = (split(h @ w[i].T, heads if i == "q" else kv) for i in "qkv")
        k, v = (y.repeat_interleave(group, 1) for y in (rotate(k), v))
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(batch, length, n) @ w["o"].T
        h = norm(x, second)
        x = x + (F.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
    x = x @ stream.single[0].T if student else x
    return norm(x, 1.0) @ head.T


times = []
for step in range(steps + 5):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.time()
    tokens = torch.randint(vocab, (batch, length), device=device)
    with torch.no_grad():
        p, at = F.log_softmax(forward(tokens, False), -1).topk(1000)
    q = F.log_softmax(forward(tokens, True), -1).gather(-1, at)
    loss = (p.exp() * (p - q)).sum() / (batch * length)
    adam.zero_grad()
    loss.backward()
    adam.step()
    [r.step(step + 1, 0.01) for r in [stream] + values]
    value = loss.item()
    times.append(time.time() - start)
times = sorted(times[5:])
print(f"PyTorch {torch.__version__}, {device}: {times[len(times) // 2]:.4f} s per step (median of {steps}), loss {value:.4f}")
