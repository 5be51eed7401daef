// Kernels for tuning and learning on NVIDIA GPUs, compiled at run time by NVRTC. All matrices are row-major f32.
// One block of threads works on one row unless said otherwise. Formulas: src/forward/backward/kernels.rs, src/tuning/blocks.rs,
// src/tuning/head.rs, src/learning/maps.rs, src/learning/fake.rs, src/forward/simulation.rs.

typedef unsigned short u16;

__device__ __forceinline__ float warp_sum(float v) {
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

// Of all threads of a block; every thread gets the result.
__device__ float block_sum(float v) {
    __shared__ float parts[33];
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        float p = threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : 0.0f;
        p = warp_sum(p);
        if (threadIdx.x == 0) parts[32] = p;
    }
    __syncthreads();
    float r = parts[32];
    __syncthreads();
    return r;
}

__device__ float block_max(float v) {
    __shared__ float parts[33];
    v = warp_max(v);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        float p = threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : -3.4e38f;
        p = warp_max(p);
        if (threadIdx.x == 0) parts[32] = p;
    }
    __syncthreads();
    float r = parts[32];
    __syncthreads();
    return r;
}

extern "C" __global__ void embed(float *out, const float *table, const int *tokens, int n, float scale) {
    const float *row = table + (size_t)tokens[blockIdx.x] * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(size_t)blockIdx.x * n + i] = row[i] * scale;
}

extern "C" __global__ void scatter(float *table, const int *tokens, const float *d, int n, float scale) {
    float *row = table + (size_t)tokens[blockIdx.x] * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(row + i, d[(size_t)blockIdx.x * n + i] * scale);
}

extern "C" __global__ void rms_norm(float *out, float *inverse, const float *x, const float *w, int n, float eps) {
    const float *row = x + (size_t)blockIdx.x * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[i] * row[i];
    float r = 1.0f / sqrtf(block_sum(sum) / n + eps);
    if (threadIdx.x == 0 && inverse) inverse[blockIdx.x] = r;
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[(size_t)blockIdx.x * n + i] = row[i] * r * w[i];
}

// dx = r w dy - x r^3 / n sum(x w dy), added to what is there if `add`. `inverse` keeps r.
extern "C" __global__ void rms_norm_back(
    float *dx, float *inverse, const float *x, const float *w, const float *dy, int n, float eps, int add) {
    size_t at = (size_t)blockIdx.x * n;
    float squares = 0.0f, dot = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = x[at + i];
        squares += v * v;
        dot += v * w[i] * dy[at + i];
    }
    float r = 1.0f / sqrtf(block_sum(squares) / n + eps);
    float along = r * r * r / n * block_sum(dot);
    if (threadIdx.x == 0) inverse[blockIdx.x] = r;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = r * w[i] * dy[at + i] - x[at + i] * along;
        dx[at + i] = add ? dx[at + i] + v : v;
    }
}

// dw_i = sum over rows of dy x r; blocks of 32 x 8 threads, 32 columns each.
extern "C" __global__ void norm_gradient(
    float *dw, const float *x, const float *dy, const float *inverse, int rows, int n) {
    __shared__ float parts[8][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < n)
        for (int r = threadIdx.y; r < rows; r += 8) {
            size_t at = (size_t)r * n + column;
            sum += dy[at] * x[at] * inverse[r];
        }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < n) {
        for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
        dw[column] = sum;
    }
}

// Rotates heads in place; a block is one token. `sign` -1 takes gradients back.
extern "C" __global__ void rope(
    float *x, const float *cosine, const float *sine, int heads, int head_dim, int pairs, int length, int halves, float sign) {
    int position = blockIdx.x % length;
    for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
        int head = i / pairs, p = i % pairs;
        float *h = x + ((size_t)blockIdx.x * heads + head) * head_dim;
        int a = halves ? p : 2 * p, b = halves ? p + pairs : 2 * p + 1;
        float c = cosine[position * pairs + p], s = sine[position * pairs + p] * sign;
        float u = h[a], v = h[b];
        h[a] = u * c - v * s;
        h[b] = u * s + v * c;
    }
}

// Rows of scores, `length` to a head of a window; later positions become 0.
extern "C" __global__ void softmax(float *s, int length, float scale) {
    int seen = blockIdx.x % length + 1;
    float *row = s + (size_t)blockIdx.x * length;
    float top = -3.4e38f;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) top = fmaxf(top, row[i]);
    top = block_max(top);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) {
        row[i] = expf((row[i] - top) * scale);
        sum += row[i];
    }
    sum = 1.0f / block_sum(sum);
    for (int i = threadIdx.x; i < length; i += blockDim.x) row[i] = i < seen ? row[i] * sum : 0.0f;
}

// d becomes scale p (d - sum p d); 0 for later positions.
extern "C" __global__ void softmax_back(const float *p, float *d, int length, float scale) {
    int seen = blockIdx.x % length + 1;
    const float *row = p + (size_t)blockIdx.x * length;
    float *out = d + (size_t)blockIdx.x * length;
    float dot = 0.0f;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) dot += row[i] * out[i];
    dot = block_sum(dot);
    for (int i = threadIdx.x; i < length; i += blockDim.x) out[i] = i < seen ? scale * row[i] * (out[i] - dot) : 0.0f;
}

extern "C" __global__ void silu_mul(float *out, const float *gate, const float *up, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// gate and up become their gradients.
extern "C" __global__ void silu_mul_back(float *gate, float *up, const float *d, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float g = gate[i], s = 1.0f / (1.0f + expf(-g));
    gate[i] = d[i] * up[i] * s * (1.0f + g * (1.0f - s));
    up[i] = d[i] * g * s;
}

// x += scale y.
extern "C" __global__ void add(float *x, const float *y, float scale, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] += scale * y[i];
}

// out = scale x.
extern "C" __global__ void scaled(float *out, const float *x, float scale, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = scale * x[i];
}

extern "C" __global__ void add_bias(float *x, const float *b, int n, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] += b[i % n];
}

// KL(p || q) of a row of logits of both models, times `scale`; with `weight`, `q` becomes the gradient.
extern "C" __global__ void divergence(double *sums, float *q, const float *p, int vocab, float scale, float weight) {
    float *a = q + (size_t)blockIdx.x * vocab;
    const float *b = p + (size_t)blockIdx.x * vocab;
    float top_a = -3.4e38f, top_b = -3.4e38f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        top_a = fmaxf(top_a, a[i]);
        top_b = fmaxf(top_b, b[i]);
    }
    top_a = block_max(top_a);
    top_b = block_max(top_b);
    float sum_a = 0.0f, sum_b = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        sum_a += expf((a[i] - top_a) * scale);
        sum_b += expf((b[i] - top_b) * scale);
    }
    sum_a = block_sum(sum_a);
    sum_b = block_sum(sum_b);
    float shift = logf(sum_a) - logf(sum_b), along = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float u = (a[i] - top_a) * scale, v = (b[i] - top_b) * scale;
        float pi = expf(v) / sum_b;
        along += pi * (v - u);
        if (weight != 0.0f) a[i] = (expf(u) / sum_a - pi) * weight * scale;
    }
    along = block_sum(along);
    if (threadIdx.x == 0) sums[blockIdx.x] = (double)along + (double)shift;
}

// The same over the k largest p, neither side normalised anew; every thread counts in a histogram of eight bits at a time.
extern "C" __global__ void top_divergence(
    double *sums, float *q, const float *p, int vocab, float scale, float weight, int k) {
    __shared__ unsigned counts[256], prefix, left;
    float *a = q + (size_t)blockIdx.x * vocab;
    const float *b = p + (size_t)blockIdx.x * vocab;
    if (threadIdx.x == 0) prefix = 0, left = k;
    // the k-th largest, as an integer of the same order as the floats
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            unsigned u = __float_as_uint(b[i]);
            u ^= u >> 31 ? 0xffffffffu : 0x80000000u;
            if (shift == 24 || u >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(counts + (u >> shift & 255), 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            for (; bin > 0 && counts[bin] < left; bin--) left -= counts[bin];
            prefix |= (unsigned)bin << shift;
        }
        __syncthreads();
    }
    unsigned bits = prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu);
    float least = k < vocab ? __uint_as_float(bits) : -3.4e38f;
    float top_a = -3.4e38f, top_b = -3.4e38f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        top_a = fmaxf(top_a, a[i]);
        top_b = fmaxf(top_b, b[i]);
    }
    top_a = block_max(top_a);
    top_b = block_max(top_b);
    float sum_a = 0.0f, sum_b = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        sum_a += expf((a[i] - top_a) * scale);
        sum_b += expf((b[i] - top_b) * scale);
    }
    sum_a = block_sum(sum_a);
    sum_b = block_sum(sum_b);
    float shift_all = logf(sum_a) - logf(sum_b), along = 0.0f, mass = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (b[i] < least) continue;
        float u = (a[i] - top_a) * scale, v = (b[i] - top_b) * scale, pi = expf(v) / sum_b;
        mass += pi;
        along += pi * (v - u + shift_all);
    }
    mass = block_sum(mass);
    along = block_sum(along);
    if (threadIdx.x == 0) sums[blockIdx.x] = along;
    if (weight == 0.0f) return;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float pi = b[i] < least ? 0.0f : expf((b[i] - top_b) * scale) / sum_b;
        a[i] = (mass * expf((a[i] - top_a) * scale) / sum_a - pi) * weight * scale;
    }
}

// -log q of the token that follows position `first + blockIdx.x`; the last position of a window has none.
extern "C" __global__ void surprise(
    double *sums, float *q, const int *tokens, int vocab, float scale, float weight, int first, int length) {
    float *a = q + (size_t)blockIdx.x * vocab;
    int at = first + blockIdx.x;
    int label = (at + 1) % length == 0 ? -1 : tokens[at + 1];
    float top = -3.4e38f, sum = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) top = fmaxf(top, a[i]);
    top = block_max(top);
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf((a[i] - top) * scale);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = label < 0 ? 0.0 : (double)logf(sum) - (double)((a[label] - top) * scale);
    __syncthreads();
    if (weight == 0.0f) return;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x)
        a[i] = label < 0 ? 0.0f : (expf((a[i] - top) * scale) / sum - (i == label ? 1.0f : 0.0f)) * weight * scale;
}

// The rounding of f32 to f16 and back, to nearest even, as the hardware does it.
__device__ __forceinline__ float stored_f16(float v) {
    v = fminf(fmaxf(v, -65504.0f), 65504.0f);
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}

struct Adam {
    float beta1, beta2, correction1, correction2, rate, code_rate;
};

__device__ __forceinline__ float direction(const Adam &a, float g, float *m, float *v) {
    *m = a.beta1 * *m + (1.0f - a.beta1) * g;
    *v = a.beta2 * *v + (1.0f - a.beta2) * g * g;
    return (*m / a.correction1) / (sqrtf(*v / a.correction2) + 1e-12f);
}

// One kind of parameter: value, unit, m, v.
struct Kind {
    float *value, *unit, *m, *v;
};

__device__ __forceinline__ void move_one(const Adam &a, const Kind &k, size_t i, float g) {
    k.value[i] -= a.rate * k.unit[i] * direction(a, g, k.m + i, k.v + i);
}

extern "C" __global__ void step_norm(float *value, float *unit, float *m, float *v, const float *g, int n, Adam a) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    Kind k = {value, unit, m, v};
    if (i < n) move_one(a, k, i, g[i]);
}

// What a tensor's blocks are made of; see `Grid`.
struct Blocks {
    float *codes, *code_m, *code_v; // moments null: codes stay
    Kind scales, offsets, d, m;     // values null: none
    const float *levels;            // a table of 16, or null: the integers lo..hi
    float lo, hi, spacing, beyond;  // how far latent codes go beyond the ends
    int block, sub;
    int scale_lo, scale_hi; // of integer scales
    int offset_hi;          // of integer offsets; 0: one f16 offset, -1: none
    int frozen;             // d is no f16 number (E8M0)
};

__device__ __forceinline__ float level(const Blocks &b, float t) {
    if (!b.levels) return rintf(fminf(fmaxf(t, b.lo), b.hi));
    float best = b.levels[0];
    for (int i = 1; i < 16; i++)
        if (b.levels[i] > b.levels[i - 1] && t >= (b.levels[i] + b.levels[i - 1]) * 0.5f) best = b.levels[i];
    return best;
}

struct Line {
    float d, s, m, o;
};

__device__ __forceinline__ Line line(const Blocks &b, size_t at, size_t sub) {
    Line l;
    l.d = b.frozen ? b.d.value[at] : stored_f16(b.d.value[at]);
    l.s = 1.0f;
    if (b.scales.value) l.s = rintf(fminf(fmaxf(b.scales.value[sub], (float)b.scale_lo), (float)b.scale_hi));
    l.m = 0.0f;
    l.o = 0.0f;
    if (b.offset_hi >= 0) l.m = stored_f16(b.m.value[at]);
    if (b.offset_hi == 0) l.o = -1.0f;
    if (b.offset_hi > 0) l.o = rintf(fminf(fmaxf(b.offsets.value[sub], 0.0f), (float)b.offset_hi));
    return l;
}

// One warp per block of the format: with `g` a step of its parameters; then its values to `w`.
extern "C" __global__ void step_blocks(Blocks b, const float *g, float *w, int count, Adam a) {
    int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (at >= count) return;
    int subs = b.block / b.sub;
    float slope_d = 0.0f, slope_m = 0.0f;
    float lo = b.lo - b.beyond, hi = b.hi + b.beyond;
    if (g) {
        for (int s = 0; s < subs; s++) {
            size_t sub = (size_t)at * subs + s, from = sub * b.sub;
            Line l = line(b, at, sub);
            float scale = l.d * l.s, along = 0.0f, all = 0.0f;
            for (int i = lane; i < b.sub; i += 32) {
                float t = b.codes[from + i], dw = g[from + i];
                along += dw * level(b, t);
                all += dw;
                if (b.code_m && a.code_rate > 0.0f) {
                    float by = direction(a, dw * scale, b.code_m + from + i, b.code_v + from + i);
                    b.codes[from + i] = fminf(fmaxf(t - a.code_rate * b.spacing * by, lo), hi);
                }
            }
            along = warp_sum(along);
            all = warp_sum(all);
            slope_d += l.s * along;
            slope_m -= l.o * all;
            __syncwarp();
            if (lane == 0) {
                if (b.scales.value) move_one(a, b.scales, sub, l.d * along);
                if (b.offset_hi > 0) move_one(a, b.offsets, sub, -l.m * all);
            }
        }
        if (lane == 0) {
            if (!b.frozen) move_one(a, b.d, at, slope_d);
            if (b.offset_hi >= 0) move_one(a, b.m, at, slope_m);
        }
        __syncwarp();
        __threadfence_block();
    }
    for (int s = 0; s < subs; s++) {
        size_t sub = (size_t)at * subs + s, from = sub * b.sub;
        Line l = line(b, at, sub);
        for (int i = lane; i < b.sub; i += 32) w[from + i] = l.d * l.s * level(b, b.codes[from + i]) - l.m * l.o;
    }
}

extern "C" __global__ void fill(float *x, float value, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] = value;
}

// out = x diag(s); `out` may be x.
extern "C" __global__ void scale_columns(float *out, const float *x, const float *s, int columns, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = x[i] * s[i % columns];
}

// out = diag(s) x; `out` may be x.
extern "C" __global__ void scale_rows(float *out, const float *x, const float *s, int columns, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = x[i] * s[i / columns];
}

// Sums over rows of g z (of g alone without z), for each column; blocks of 32 x 8 threads, 32 columns each.
extern "C" __global__ void along_columns(float *out, const float *g, const float *z, int rows, int columns) {
    __shared__ float parts[8][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < columns)
        for (int r = threadIdx.y; r < rows; r += 8) {
            size_t at = (size_t)r * columns + column;
            sum += z ? g[at] * z[at] : g[at];
        }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
        out[column] = sum;
    }
}

// Sums of g z, for each row.
extern "C" __global__ void along_rows(float *out, const float *g, const float *z, int columns) {
    size_t at = (size_t)blockIdx.x * columns;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += g[at + i] * z[at + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Integers from the smallest to the largest value of a row, 0 among them.
extern "C" __global__ void asymmetric(float *x, int columns, int bits) {
    float *row = x + (size_t)blockIdx.x * columns;
    float low = 0.0f, high = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        low = fminf(low, row[i]);
        high = fmaxf(high, row[i]);
    }
    low = -block_max(-low);
    high = block_max(high);
    float most = (float)((1u << bits) - 1), scale = (high - low) / most;
    if (scale == 0.0f) return;
    float inverse = 1.0f / scale, zero = rintf(-low / scale);
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        row[i] = (fminf(fmaxf(rintf(row[i] * inverse) + zero, 0.0f), most) - zero) * scale;
}

// Integers of a row with the scale, clipped to parts of the largest value, that errs least.
extern "C" __global__ void symmetric(float *x, int columns, int bits) {
    float *row = x + (size_t)blockIdx.x * columns;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) largest = fmaxf(largest, fabsf(row[i]));
    largest = block_max(largest);
    if (largest == 0.0f) return;
    float most = (float)((1u << (bits - 1)) - 1), least = 3.4e38f, best = largest / most;
    for (int c = 0; c < 16; c++) {
        float scale = largest / most * (1.0f - c * 0.5f / 15.0f), inverse = 1.0f / scale, error = 0.0f;
        for (int i = threadIdx.x; i < columns; i += blockDim.x) {
            float e = fminf(fmaxf(rintf(row[i] * inverse), -most - 1.0f), most) * scale - row[i];
            error += e * e;
        }
        error = block_sum(error);
        if (error < least) least = error, best = scale;
    }
    float inverse = 1.0f / best;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        row[i] = fminf(fmaxf(rintf(row[i] * inverse), -most - 1.0f), most) * best;
}

// The first place of the largest `key`; every thread of the warp gets it.
__device__ __forceinline__ int warp_first(float key, int at) {
    for (int o = 16; o > 0; o >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, key, o);
        int place = __shfl_xor_sync(0xffffffffu, at, o);
        if (other > key || (other == key && place < at)) key = other, at = place;
    }
    return at;
}

// Gradients at what runs were rounded from, out of those at what they were rounded to (`made`); a warp for each run. `offsets`:
// 0 none, 1 f16, 2 integers (never above 0).
extern "C" __global__ void fake_back(float *g, const float *w, const float *made, int run, int runs, int offsets) {
    int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (at >= runs) return;
    size_t from = (size_t)at * run;
    float along = 0.0f, most = -3.4e38f, least = -3.4e38f;
    int high = 0, low = 0;
    for (int i = lane; i < run; i += 32) {
        float v = w[from + i], key = offsets ? v : fabsf(v);
        along += g[from + i] * (made[from + i] - v);
        if (key > most) most = key, high = i;
        if (-v > least) least = -v, low = i;
    }
    along = warp_sum(along);
    high = warp_first(most, high);
    low = warp_first(least, low);
    if (lane) return;
    if (!offsets) {
        if (w[from + high] != 0.0f) g[from + high] += along / w[from + high];
        return;
    }
    float bottom = w[from + low] < 0.0f || offsets == 1 ? w[from + low] : 0.0f;
    float range = w[from + high] - bottom;
    if (range > 0.0f) {
        g[from + high] += along / range;
        if (w[from + low] < 0.0f || offsets == 1) g[from + low] -= along / range;
    }
}
