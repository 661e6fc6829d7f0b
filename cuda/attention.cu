// Attention layers: norm and rotation of queries and keys, attention with odd head sizes, and the launchers. Attention
// with the family's sizes is in attention_prefill.cu and attention_decode.cu.
#include <cuda_fp8.h>

#include "attention.cuh"

namespace {

// ------------------------------------------------------------------------------- norm, rotation, write to the pages

constexpr int HEAD_WARPS = 8;

struct RopeArgs {
    q35_batch batch;
    int q_heads, kv_heads, head_dim, half, stride;
    const float *q_norm, *k_norm, *inv_freq;
    const uint8_t *axis;
    float eps, rope_scale;
    const bf16 *projected;
    bf16 *q, *k_pages, *v_pages;
    uint8_t *pages;  // in fp8, where k_pages and v_pages are null
};

__device__ __forceinline__ uint32_t to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// The scale of a row in fp8, of the largest bits of its numbers without sign, which are in the order of the numbers, NaN
// last: NaN for what is not finite.
__device__ __forceinline__ float scale_of_row(uint32_t largest) {
    const float x = __uint_as_float(largest);
    return largest < 0x7f800000u ? x / 448.0f : __uint_as_float(0x7fffffffu);
}

// Rows of zeros have scale 0.
__device__ __forceinline__ uint32_t code_of(float x, float scale) { return scale == 0.0f ? 0 : to_e4m3(x / scale); }

// Transformers `Qwen3_5Attention`, own code. A warp per head of a token: the query heads, then the keys, then the
// values. VECTOR: a lane holds eight neighbouring elements, which needs their number and alignment to allow it.
// FP8: pages are in fp8, and made of the f32 that would be rounded to bf16.
template <bool VECTOR, bool FP8>
__global__ void __launch_bounds__(32 * HEAD_WARPS) qk_norm_rope_write_kernel(RopeArgs args) {
    extern __shared__ float rotation[];  // cosines [half], sines [half]
    const q35_batch &batch = args.batch;
    const int token = blockIdx.x, d = args.head_dim, half = args.half;
    const int head = blockIdx.y * HEAD_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, start = 8 * lane;
    const int num_heads = args.q_heads + 2 * args.kv_heads, other = head - args.q_heads;
    const bool is_kept = head >= args.q_heads && head < num_heads, is_value = other >= args.kv_heads;
    const bool active = VECTOR && start < d && head < num_heads;
    const float *norm = head < args.q_heads ? args.q_norm : args.k_norm;
    float *cosines = rotation, *sines = rotation + half;
    float weights[8] = {};
    if (active && !is_value) {
#pragma unroll
        for (int i = 0; i < 8; i++) weights[i] = norm[start + i];
    }
    float frequency = 0.0f;
    int axis = 0;
    if (int(threadIdx.x) < half) frequency = args.inv_freq[threadIdx.x], axis = args.axis[threadIdx.x];
    let_next_start();
    wait_for_inputs();

    // What comes from memory is on its way before the angles are computed: the row, and step by step the page.
    const bf16 *from = args.projected + int64_t(token) * args.stride +
                       (head < args.q_heads ? int64_t(2) * head * d : (int64_t(2) * args.q_heads + other) * d);
    uint4 words = make_uint4(0, 0, 0, 0);
    if (active) words = *reinterpret_cast<const uint4 *>(from + start);
    const int *positions = batch.positions + 3 * int64_t(token);
    float position = float(positions[axis]);
    int place = 0, entry = 0, page = 0;
    if (is_kept) {
        const int seq = batch.seq_of[token];
        place = batch.cached_len[seq] + token - batch.query_start[seq];
        entry = batch.page_start[seq] + place / Q35_PAGE_LEN;
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        if (i != int(threadIdx.x)) frequency = args.inv_freq[i], position = float(positions[args.axis[i]]);
        float sine, cosine;
        sincosf(position * frequency, &sine, &cosine);
        sines[i] = sine * args.rope_scale;
        cosines[i] = cosine * args.rope_scale;
    }
    if (is_kept) page = batch.pages[entry];
    __syncthreads();

    if (head >= num_heads) return;
    bf16 *to = args.q + (int64_t(token) * args.q_heads + head) * d;
    uint8_t *codes = nullptr;
    float *scale_at = nullptr;
    if (FP8 && is_kept) {
        const int64_t kept = (int64_t(page) * args.kv_heads + other % args.kv_heads) * 2 + is_value;
        uint8_t *part = args.pages + kept * fp8_bytes(d);
        codes = part + place % Q35_PAGE_LEN * d;
        scale_at = reinterpret_cast<float *>(part + Q35_PAGE_LEN * d) + place % Q35_PAGE_LEN;
    } else if (is_kept) {
        const int64_t kept = int64_t(page) * args.kv_heads + other % args.kv_heads;
        to = (is_value ? args.v_pages : args.k_pages) + (kept * Q35_PAGE_LEN + place % Q35_PAGE_LEN) * d;
    }
    if constexpr (VECTOR) {
        // A row in fp8, of which each lane has its part.
        auto quantise = [&](const float (&x)[8]) {
            uint32_t largest = 0, word[2] = {};
#pragma unroll
            for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
            const float scale = scale_of_row(__reduce_max_sync(ALL_LANES, largest));
#pragma unroll
            for (int i = 0; i < 8; i++) word[i / 4] |= code_of(x[i], scale) << 8 * (i % 4);
            if (active) *reinterpret_cast<uint2 *>(codes + start) = make_uint2(word[0], word[1]);
            if (lane == 0) *scale_at = scale;
        };
        if (FP8 && is_value) {
            float x[8];
            unpack8(words, x);
            quantise(x);
            return;
        }
        if (is_value) {
            if (active) *reinterpret_cast<uint4 *>(to + start) = words;
            return;
        }
        float x[8], squares = 0.0f;
        unpack8(words, x);
#pragma unroll
        for (int i = 0; i < 8; i++) squares += x[i] * x[i];
        const float scale = 1.0f / sqrtf(lane_sum(squares) / float(d) + args.eps);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = x[i] * scale * weights[i];
        // The lanes of the first half trade with those of the second; the others trade with themselves.
        const int distance = half / 8;
        const int partner = lane < distance ? lane + distance : lane < 2 * distance ? lane - distance : lane;
        const float sign = lane < distance ? -1.0f : 1.0f;
        const int angle = lane < distance ? start : start - half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float y = __shfl_sync(ALL_LANES, x[i], partner);
            if (lane < 2 * distance) x[i] = x[i] * cosines[angle + i] + sign * y * sines[angle + i];
        }
        if (FP8 && is_kept) quantise(x);
        else if (active) store8(to + start, x);
    } else {
        auto quantise = [&](auto element) {
            uint32_t largest = 0;
            for (int i = lane; i < d; i += 32) largest = max(largest, __float_as_uint(element(i)) & 0x7fffffffu);
            const float scale = scale_of_row(__reduce_max_sync(ALL_LANES, largest));
            for (int i = lane; i < d; i += 32) codes[i] = uint8_t(code_of(element(i), scale));
            if (lane == 0) *scale_at = scale;
        };
        if (FP8 && is_value) {
            quantise([&](int i) { return __bfloat162float(from[i]); });
            return;
        }
        if (is_value) {
            for (int i = lane; i < d; i += 32) to[i] = from[i];
            return;
        }
        float squares = 0.0f;
        for (int i = lane; i < d; i += 32) {
            const float x = __bfloat162float(from[i]);
            squares += x * x;
        }
        const float scale = 1.0f / sqrtf(lane_sum(squares) / float(d) + args.eps);
        auto normed = [&](int i) { return __bfloat162float(from[i]) * scale * norm[i]; };
        if (FP8 && is_kept) {
            quantise([&](int i) {
                if (i >= 2 * half) return normed(i);
                const int angle = i < half ? i : i - half;
                const float a = normed(angle), b = normed(angle + half);
                return i < half ? a * cosines[angle] - b * sines[angle] : b * cosines[angle] + a * sines[angle];
            });
            return;
        }
        for (int i = lane; i < half; i += 32) {
            const float a = normed(i), b = normed(i + half);
            to[i] = __float2bfloat16_rn(a * cosines[i] - b * sines[i]);
            to[i + half] = __float2bfloat16_rn(b * cosines[i] + a * sines[i]);
        }
        for (int i = 2 * half + lane; i < d; i += 32) to[i] = __float2bfloat16_rn(normed(i));
    }
}

// ------------------------------------------------------------------------------------------------- any size of heads

constexpr int PLAIN_WARPS = 4;

// A row of keys or values in fp8; null stands for none.
struct CodedRow {
    const uint8_t *codes;
    float scale;

    __device__ CodedRow(const uint8_t *part, int place, int d) : codes(part + place * d), scale(0) {
        if (part != nullptr) scale = reinterpret_cast<const float *>(part + Q35_PAGE_LEN * d)[place];
    }
    __device__ float operator[](int i) const {
        // The bits of a code in the places of an f32's are the number divided by 2^120.
        const uint32_t code = codes[i], bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
        return __uint_as_float(bits) * 0x1p120f * scale;
    }
};

// A warp per token and query head, one key after the other with a running softmax; own code. For sizes no model of
// the family has.
template <int PER_LANE, bool FP8>
__global__ void __launch_bounds__(32 * PLAIN_WARPS) plain_kernel(AttentionArgs args) {
    let_next_start();
    wait_for_inputs();
    const q35_batch &batch = args.batch;
    const int64_t task = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, d = args.head_dim;
    if (task >= int64_t(batch.num_tokens) * args.q_heads) return;
    // The batch may be a piece of another: its lists of sequences begin where the piece does, those of tokens do not.
    int filled = 0;
    while (batch.query_len[filled] == 0) filled++;
    const int64_t token = batch.query_start[0] + task / args.q_heads;
    const int q_head = int(task % args.q_heads), head = q_head / args.group();
    const int seq = batch.seq_of[token] - batch.seq_of[batch.query_start[filled]] + filled;
    const int64_t row = (token * args.q_heads + q_head) * d;
    const int num_keys = batch.cached_len[seq] + int(token) - batch.query_start[seq] + 1;
    const int *pages = batch.pages + batch.page_start[seq];
    float q[PER_LANE], out[PER_LANE] = {}, top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int column = lane + 32 * i;
        q[i] = column < d ? __bfloat162float(args.q[row + column]) : 0.0f;
    }
    for (int key = 0; key < num_keys; key++) {
        const int page = pages[key / Q35_PAGE_LEN], place = key % Q35_PAGE_LEN;
        const int64_t at = args.page_at(page, head) + int64_t(place) * d;
        const CodedRow k(FP8 ? args.codes_at(page, head, false) : nullptr, place, d);
        const CodedRow v(FP8 ? args.codes_at(page, head, true) : nullptr, place, d);
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int column = lane + 32 * i;
            if (column < d) dot += q[i] * (FP8 ? k[column] : __bfloat162float(args.k[at + column]));
        }
        const float score = lane_sum(dot) * args.scale;
        const float highest = fmaxf(top, score), safe = highest == -INFINITY ? 0.0f : highest;
        const float fade = exp2f(top - safe), weight = exp2f(score - safe);
        top = highest;
        sum = sum * fade + weight;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int column = lane + 32 * i;
            if (column < d) out[i] = out[i] * fade + weight * (FP8 ? v[column] : __bfloat162float(args.v[at + column]));
        }
    }
    const bf16 *gate = args.gate(token, q_head);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int column = lane + 32 * i;
        if (column >= d) continue;
        args.out[row + column] = __float2bfloat16_rn(out[i] / sum * sigmoid(__bfloat162float(gate[column])));
    }
}

cudaError_t plain(cudaStream_t stream, const AttentionArgs &args) {
    const int64_t tasks = int64_t(args.batch.num_tokens) * args.q_heads;
    const int64_t blocks = ceil_div(tasks, PLAIN_WARPS);
    if (blocks > INT32_MAX || args.head_dim > 1024) return cudaErrorInvalidValue;
    const bool small = args.head_dim <= 256, fp8 = args.codes != nullptr;
    const auto kernel = fp8 ? (small ? plain_kernel<8, true> : plain_kernel<32, true>)
                            : (small ? plain_kernel<8, false> : plain_kernel<32, false>);
    return launch(kernel, unsigned(blocks), 32 * PLAIN_WARPS, 0, stream, args);
}

bool has_tiles(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }

// Whether the tensor-core kernels can run here. The answer must not change between batches of one model.
bool fits(const AttentionArgs &args) {
    if (!has_tiles(args.head_dim)) return false;
    int device = 0, limit = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        return false;
    }
    const bool is_aligned = aligned(args.q, 16) && aligned(args.k, 16) && aligned(args.v, 16) && aligned(args.codes, 16) &&
                            aligned(args.out, 8);
    return is_aligned && attention_decode_fits(args.head_dim, limit) && attention_prefill_fits(args.head_dim, limit);
}

}  // namespace

static int norm_rope_write(void *stream, const RopeArgs &args) {
    if (args.batch.num_tokens == 0) return cudaSuccess;
    const int d = args.head_dim, heads = args.q_heads + 2 * args.kv_heads;
    if (2 * args.half > d) return cudaErrorInvalidValue;
    const dim3 grid(unsigned(args.batch.num_tokens), unsigned(ceil_div(heads, HEAD_WARPS)));
    const size_t shared = 2 * sizeof(float) * size_t(args.half);
    if (grid.y > 65535 || shared > 48 * 1024) return cudaErrorInvalidValue;
    const bool vector = d % 8 == 0 && d <= 256 && args.half % 8 == 0 && args.stride % 8 == 0 &&
                        aligned(args.projected, 16) && aligned(args.q, 16) && aligned(args.k_pages, 16) &&
                        aligned(args.v_pages, 16) && aligned(args.pages, 16);
    const bool fp8 = args.pages != nullptr;
    const auto kernel = fp8 ? (vector ? qk_norm_rope_write_kernel<true, true> : qk_norm_rope_write_kernel<false, true>)
                            : (vector ? qk_norm_rope_write_kernel<true, false> : qk_norm_rope_write_kernel<false, false>);
    return launch(kernel, grid, 32 * HEAD_WARPS, shared, as_stream(stream), args);
}

extern "C" int q35_qk_norm_rope_write(void *stream, q35_batch batch, q35_attention_dims dims, const float *q_norm,
                                      const float *k_norm, float eps, const float *inv_freq, const uint8_t *axis,
                                      int num_freqs, float rope_scale, const q35_bf16 *projected, int stride,
                                      q35_bf16 *q, q35_bf16 *k_pages, q35_bf16 *v_pages) {
    const RopeArgs args{batch,  dims.num_q_heads, dims.num_kv_heads, dims.head_dim,    num_freqs,       stride,
                        q_norm, k_norm,           inv_freq,          axis,             eps,             rope_scale,
                        as_bf16(projected),       as_bf16(q),        as_bf16(k_pages), as_bf16(v_pages), nullptr};
    return norm_rope_write(stream, args);
}

extern "C" int q35_qk_norm_rope_write_fp8(void *stream, q35_batch batch, q35_attention_dims dims, const float *q_norm,
                                          const float *k_norm, float eps, const float *inv_freq, const uint8_t *axis,
                                          int num_freqs, float rope_scale, const q35_bf16 *projected, int stride,
                                          q35_bf16 *q, uint8_t *pages) {
    const RopeArgs args{batch,  dims.num_q_heads, dims.num_kv_heads, dims.head_dim, num_freqs, stride,
                        q_norm, k_norm,           inv_freq,          axis,          eps,       rope_scale,
                        as_bf16(projected),       as_bf16(q),        nullptr,       nullptr,   pages};
    return norm_rope_write(stream, args);
}

extern "C" int64_t q35_attention_workspace(int max_tokens, int max_seqs, int max_kv_len, q35_attention_dims dims) {
    (void)max_tokens, (void)max_kv_len;
    if (!has_tiles(dims.head_dim)) return 0;
    return attention_decode_workspace(max_seqs, dims);
}

// Where the parts of the workspace are, in floats, for pages in fp8: decoded keys, then values, the list of their pages,
// where sequences start in it, what decode needs.
struct Fp8Workspace {
    int64_t page_list, page_start, decode;

    Fp8Workspace(int room, int max_seqs, q35_attention_dims dims) {
        // Two bf16 are a float.
        page_list = int64_t(room) * dims.num_kv_heads * Q35_PAGE_LEN * dims.head_dim;
        page_start = page_list + ceil_div(room, 64) * 64;
        decode = page_start + ceil_div(max_seqs, 64) * 64;
    }
};

extern "C" int64_t q35_attention_fp8_workspace(int room, int max_seqs, q35_attention_dims dims) {
    if (!has_tiles(dims.head_dim)) return 0;
    return Fp8Workspace(room, max_seqs, dims).decode + attention_decode_workspace(max_seqs, dims);
}

static AttentionArgs attention_args(q35_batch batch, q35_attention_dims dims, const q35_bf16 *q,
                                    const q35_bf16 *projected, int stride, q35_bf16 *out) {
    const float log2e = 1.4426950408889634f;
    return {batch,
            dims.num_q_heads,
            dims.num_kv_heads,
            dims.head_dim,
            stride,
            log2e / sqrtf(float(dims.head_dim)),
            as_bf16(q),
            as_bf16(projected),
            nullptr,
            nullptr,
            as_bf16(out),
            nullptr};
}

extern "C" int q35_gated_attention(void *stream, q35_batch batch, q35_attention_dims dims, const q35_bf16 *q,
                                   const q35_bf16 *projected, int stride, const q35_bf16 *k_pages,
                                   const q35_bf16 *v_pages, float *workspace, q35_bf16 *out) {
    if (batch.num_tokens == 0) return cudaSuccess;
    AttentionArgs args = attention_args(batch, dims, q, projected, stride, out);
    args.k = as_bf16(k_pages), args.v = as_bf16(v_pages);
    const cudaStream_t on = as_stream(stream);
    if (!fits(args)) return plain(on, args);
    if (batch.max_query_len > MAX_DECODE_LEN) {
        const cudaError_t status = attention_prefill(on, args);
        // Equally long sequences are all prefill.
        if (status != cudaSuccess || int64_t(batch.max_query_len) * batch.num_seqs == batch.num_tokens) return status;
    }
    return attention_decode(on, args, workspace);
}

extern "C" int q35_gated_attention_fp8(void *stream, q35_batch batch, q35_attention_dims dims, const q35_bf16 *q,
                                       const q35_bf16 *projected, int stride, const uint8_t *pages, int room,
                                       int max_seqs, float *workspace, q35_bf16 *out) {
    if (batch.num_tokens == 0) return cudaSuccess;
    if (batch.num_seqs > max_seqs) return cudaErrorInvalidValue;
    AttentionArgs args = attention_args(batch, dims, q, projected, stride, out);
    args.codes = pages;
    const cudaStream_t on = as_stream(stream);
    if (!fits(args)) return plain(on, args);
    const Fp8Workspace parts(room, max_seqs, dims);
    if (batch.max_query_len > MAX_DECODE_LEN) {
        const cudaError_t status = attention_prefill_fp8(on, args, room, reinterpret_cast<bf16 *>(workspace),
                                                         reinterpret_cast<int *>(workspace + parts.page_list),
                                                         reinterpret_cast<int *>(workspace + parts.page_start));
        if (status != cudaSuccess || int64_t(batch.max_query_len) * batch.num_seqs == batch.num_tokens) return status;
    }
    return attention_decode(on, args, workspace + parts.decode);
}
