// One token's products on a CPU, for native.py: rows of weights that are read once, as they lie.
//
//   y[m, n] = sum_k W[n, k] x[m, k]  (+ bias[n])  (+ scaling * sum_r B[n, r] sum_k A[r, k] x[m, k])
//
// W lies as float32, as bfloat16, or in four bits with a scale a block (lorax/quant/four_bit.py). A
// row of W is brought to float32 in the first-level cache and multiplied with all M rows of x there,
// so that the memory is read once for all of them. Sums are float32 and in one order whatever M is:
// a prompt among others gets the bits that it gets alone.
//
// There is no Python in here and no torch: pointers and sizes, checked by native.py.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FOUR_BIT = 2 };
#define SIZE(kind) ((kind) == FLOAT32 ? 4 : 2)
#define INLINE static inline __attribute__((always_inline))

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t h8 __attribute__((vector_size(16), aligned(2), may_alias));

typedef struct {
    int64_t kind, in, out, block;  // of W (out, in); block: values a scale
    const void *weight;
    const float *scales;  // (out * in / block,), of four bits
    const float *code;    // the 16 values of the codes
    const float *bias;    // (out,) or 0
    int64_t rank;         // 0: no low-rank path
    int64_t path_kind;    // of A (rank, in) and B (out, rank)
    const void *A, *B;
    float scaling;
} Product;

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (bits >> 16) | 0x40;  // NaN stays NaN
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;                 // to even
}

static inline v8 eight(const void *x, int64_t kind, int64_t at) {
    if (kind == FLOAT32) return *(const v8 *)((const float *)x + at);
    h8 half = *(const h8 *)((const uint16_t *)x + at);
    i8 wide = __builtin_convertvector(half, i8) << 16;
    return (v8)wide;
}

static inline float one(const void *x, int64_t kind, int64_t at) {
    return kind == FLOAT32 ? ((const float *)x)[at] : from_bfloat16(((const uint16_t *)x)[at]);
}

static inline void put(void *x, int64_t kind, int64_t at, float value) {
    if (kind == FLOAT32)
        ((float *)x)[at] = value;
    else
        ((uint16_t *)x)[at] = to_bfloat16(value);
}

static inline float sum_of(v8 a) {
    return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

// out[i] = x[i] in float32.
static void widen(const void *x, int64_t kind, int64_t at, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) *(v8 *)(out + i) = eight(x, kind, at + i);
    for (; i < n; i++) out[i] = one(x, kind, at + i);
}

// 32 values from 16 bytes, the high nibble first, times their scale.
#if defined(__AVX2__) && defined(__FMA__)
typedef struct {
    __m256i plane[4];
} Codes;

// Byte b of each of the 16 values, so that four shuffles of bytes look 32 codes up.
static inline Codes codes_of(const float *code) {
    Codes found;
    uint8_t plane[16];
    for (int b = 0; b < 4; b++) {
        for (int i = 0; i < 16; i++) plane[i] = ((const uint8_t *)(code + i))[b];
        found.plane[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)plane));
    }
    return found;
}

static inline void decode32(const uint8_t *packed, const Codes *codes, float scale, v8 *out) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)packed), low = _mm_set1_epi8(15);
    __m128i second = _mm_and_si128(bytes, low);
    __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
    __m256i index = _mm256_set_m128i(
        _mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
    // Four codes of each eight into the lower half, so that what is interleaved below is in order.
    index = _mm256_permutevar8x32_epi32(index, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    __m256i b0 = _mm256_shuffle_epi8(codes->plane[0], index);
    __m256i b1 = _mm256_shuffle_epi8(codes->plane[1], index);
    __m256i b2 = _mm256_shuffle_epi8(codes->plane[2], index);
    __m256i b3 = _mm256_shuffle_epi8(codes->plane[3], index);
    __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    __m256 s = _mm256_set1_ps(scale);
    __m256i words[4] = {
        _mm256_unpacklo_epi16(low0, high0), _mm256_unpackhi_epi16(low0, high0),
        _mm256_unpacklo_epi16(low1, high1), _mm256_unpackhi_epi16(low1, high1)};
    for (int i = 0; i < 4; i++) out[i] = (v8)_mm256_mul_ps(_mm256_castsi256_ps(words[i]), s);
}
#else
typedef struct {
    float value[16];
} Codes;

static inline Codes codes_of(const float *code) {
    Codes found;
    memcpy(found.value, code, sizeof found.value);
    return found;
}

static inline void decode32(const uint8_t *packed, const Codes *codes, float scale, v8 *out) {
    for (int i = 0; i < 16; i++) {
        out[i / 4][2 * (i % 4)] = codes->value[packed[i] >> 4] * scale;
        out[i / 4][2 * (i % 4) + 1] = codes->value[packed[i] & 15] * scale;
    }
}
#endif

// Row n of W in float32 (in,).
static void row_of(const Product *p, const Codes *codes, int64_t n, float *out) {
    int64_t at = n * p->in;
    if (p->kind != FOUR_BIT) {
        widen(p->weight, p->kind, at, p->in, out);
        return;
    }
    const uint8_t *packed = (const uint8_t *)p->weight + at / 2;
    int shift = __builtin_ctzll(p->block);
    for (int64_t k = 0; k < p->in; k += 32)
        decode32(packed + k / 2, codes, p->scales[(at + k) >> shift], (v8 *)(out + k));
}

// AHEAD: how many rows further the memory is asked for; on a busy machine bfloat16 takes 0.7 of the
// time for it.
enum { MOST_ROWS = 16, MOST_TOGETHER = 3, TILE = 4, AHEAD = 8 };

// y[i][j] = w[i] . x[j], for a tile of rows of W and rows of x. Every tile adds up in one order.
INLINE void tile(
    const void *w, int64_t kind, const float *x, int64_t n, int rows, int columns, float *y,
    int64_t stride) {
    v8 sums[4][2] = {0};
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int i = 0; i < rows; i++) {
            if (k % (64 / SIZE(kind)) == 0)  // once a cache line
                __builtin_prefetch((const char *)w + ((i + AHEAD) * n + k) * SIZE(kind));
            v8 part = eight(w, kind, i * n + k);
            for (int j = 0; j < columns; j++) sums[i][j] += part * *(const v8 *)(x + j * n + k);
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            float sum = sum_of(sums[i][j]);
            for (int64_t t = k; t < n; t++) sum = fmaf(one(w, kind, i * n + t), x[j * n + t], sum);
            y[i + j * stride] = sum;
        }
}

// The tile of four rows of four bits and one row of x, without a stop in memory.
static void tile_of_codes(
    const Product *p, const Codes *codes, int64_t first, const float *x, float *y) {
    v8 sums[4] = {0}, part[4];
    int shift = __builtin_ctzll(p->block);
    for (int64_t k = 0; k < p->in; k += 32)
        for (int i = 0; i < 4; i++) {
            int64_t at = (first + i) * p->in + k;
            decode32((const uint8_t *)p->weight + at / 2, codes, p->scales[at >> shift], part);
            for (int j = 0; j < 4; j++) sums[i] += part[j] * *(const v8 *)(x + k + 8 * j);
        }
    for (int i = 0; i < 4; i++) y[i] = sum_of(sums[i]);
}

// y[i + m * stride] = w[i] . x[m]: `rows` rows of W, as they lie or brought to float32, and all of x.
static void tiles(
    const void *w, int64_t kind, const float *x, int64_t n, int64_t rows, int64_t M, float *y,
    int64_t stride) {
    for (int64_t m = 0; m < M; m += 2) {
        int both = m + 2 <= M;
        const float *xm = x + m * n;
        float *ym = y + m * stride;
        if (rows == 4 && kind == FLOAT32) {
            both ? tile(w, FLOAT32, xm, n, 4, 2, ym, stride) : tile(w, FLOAT32, xm, n, 4, 1, ym, stride);
        } else if (rows == 4) {
            both ? tile(w, BFLOAT16, xm, n, 4, 2, ym, stride) : tile(w, BFLOAT16, xm, n, 4, 1, ym, stride);
        } else {
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < 1 + both; j++)
                    tile((const char *)w + i * n * SIZE(kind), kind, xm + j * n, n, 1, 1,
                         ym + i + j * stride, stride);
        }
    }
}


// found[i + m * TILE]: W's rows first, first + 1, ... and x's rows.
static void rows_times(
    const Product *p, const Codes *codes, int64_t first, int64_t rows, const float *x, int64_t M,
    float *buffer, float *found) {
    const void *w = (const char *)p->weight + first * p->in * SIZE(p->kind);
    int64_t kind = p->kind;
    if (kind == FOUR_BIT && M == 1 && rows == TILE) {
        tile_of_codes(p, codes, first, x, found);
        return;
    }
    if (kind == FOUR_BIT || (kind == BFLOAT16 && M > 2)) {
        for (int64_t i = 0; i < rows; i++) row_of(p, codes, first + i, buffer + i * p->in);
        w = buffer, kind = FLOAT32;
    }
    tiles(w, kind, x, p->in, rows, M, found, TILE);
}

// The end of the rows from m on that have one Product.
static int64_t end_of(const Product *const *each, int64_t m, int64_t M) {
    int64_t end = m + 1;
    while (end < M && each[end] == each[m]) end++;
    return end;
}

// sums[i + m * TILE]: rows first, first + 1, ... of a Linear's whole output, for x (M, in). h: row by
// row x A^T (rank,), that of row m at start[m].
static void outputs(
    const Product *const *each, const Codes *codes, int64_t first, int64_t rows, const float *x,
    const float *h, const int64_t *start, int64_t M, float *buffer, float *sums) {
    float path[TILE * MOST_ROWS];
    rows_times(each[0], codes, first, rows, x, M, buffer, sums);
    for (int64_t m = 0, end; m < M; m = end) {
        const Product *own = each[m];
        end = end_of(each, m, M);
        if (own->rank)
            tiles((const char *)own->B + first * own->rank * SIZE(own->path_kind), own->path_kind,
                  h + start[m], own->rank, rows, end - m, path + m * TILE, TILE);
        for (; m < end; m++)
            for (int64_t i = 0; i < rows; i++) {
                if (own->rank) sums[i + m * TILE] += own->scaling * path[i + m * TILE];
                if (own->bias) sums[i + m * TILE] += own->bias[first + i];
            }
    }
}

static inline float rounded(float x, int64_t kind) {
    return kind == FLOAT32 ? x : from_bfloat16(to_bfloat16(x));
}

// silu(gate) up, each step rounded to `kind`, as the model's own multiplication has it.
static inline float gated_value(float gate, float up, int64_t kind) {
    gate = rounded(gate, kind);
    return rounded(gate / (1.0f + expf(-gate)), kind) * rounded(up, kind);
}

// ys[c] (M, out) = Linear c of x (M, in), for at most MOST_TOGETHER Linears with that input; all of
// kind `kind`, M at most MOST_ROWS. Row m has the low-rank path and the bias of all[c * M + m]; the
// weight is that of row 0. gated: two of them, and ys[0] = silu(first) * second.
void products(
    const Product *const *all, void *const *ys, int64_t count, const void *given, int64_t kind,
    int64_t M, int64_t gated, int64_t threads) {
    int64_t in = all[0]->in, start[MOST_TOGETHER][MOST_ROWS];
    float *wide = 0, *hidden[MOST_TOGETHER];
    Codes codes[MOST_TOGETHER];
    const float *x = given;
    if (kind != FLOAT32) {
        wide = malloc(M * in * sizeof(float));
        widen(given, kind, 0, M * in, wide);
        x = wide;
    }
    for (int64_t c = 0; c < count; c++) {
        int64_t ranks = 0;
        for (int64_t m = 0; m < M; m++) start[c][m] = ranks, ranks += all[c * M + m]->rank;
        hidden[c] = ranks ? malloc(ranks * sizeof(float)) : 0;
        if (all[c * M]->kind == FOUR_BIT) codes[c] = codes_of(all[c * M]->code);
    }
#pragma omp parallel num_threads(threads)
    {
        float *buffer = malloc(TILE * in * sizeof(float));
        float sums[TILE * MOST_ROWS], gates[TILE * MOST_ROWS];
        for (int64_t c = 0; c < count; c++)
            for (int64_t m = 0, end; m < M; m = end) {
                const Product *p = all[c * M + m];
                end = end_of(all + c * M, m, M);
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < p->rank; r += TILE) {
                    int64_t rows = p->rank - r < TILE ? p->rank - r : TILE;
                    tiles((const char *)p->A + r * in * SIZE(p->path_kind), p->path_kind,
                          x + m * in, in, rows, end - m, hidden[c] + start[c][m] + r, p->rank);
                }
            }
#pragma omp barrier
        for (int64_t c = gated; c < count; c++) {
            int64_t out = all[c * M]->out;
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < out; n += TILE) {
                int64_t rows = out - n < TILE ? out - n : TILE;
                outputs(all + c * M, &codes[c], n, rows, x, hidden[c], start[c], M, buffer, sums);
                if (gated)
                    outputs(all, &codes[0], n, rows, x, hidden[0], start[0], M, buffer, gates);
                for (int64_t m = 0; m < M; m++)
                    for (int64_t i = 0; i < rows; i++) {
                        float y = sums[i + m * TILE];
                        if (gated) y = gated_value(gates[i + m * TILE], y, kind);
                        put(ys[c - gated], kind, m * out + n + i, y);
                    }
            }
        }
        free(buffer);
    }
    for (int64_t c = 0; c < count; c++) free(hidden[c]);
    free(wide);
}

// gate (n,) = silu(gate) * up, for products that could not be computed together.
void gate_in_place(void *gate, const void *up, int64_t kind, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        put(gate, kind, i, gated_value(one(gate, kind, i), one(up, kind, i), kind));
}

// out (out, in), of kind `kind`: W, rounded once.
void decode(const Product *p, void *out, int64_t kind, int64_t threads) {
    Codes codes;
    if (p->kind == FOUR_BIT) codes = codes_of(p->code);
#pragma omp parallel num_threads(threads)
    {
        float *buffer = malloc(p->in * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p->out; n++) {
            float *target = kind == FLOAT32 ? (float *)out + n * p->in : buffer;
            row_of(p, &codes, n, target);
            if (kind != FLOAT32)
                for (int64_t k = 0; k < p->in; k++)
                    ((uint16_t *)out)[n * p->in + k] = to_bfloat16(buffer[k]);
        }
        free(buffer);
    }
}

// out (rows, n) = x / rms(x) * (weight + offset), rounded to `kind`; between the two products too
// where `twice` says so (Llama does, Gemma does not).
void rms_norm(
    const void *x, const void *weight, void *out, int64_t kind, int64_t rows, int64_t n, float eps,
    float offset, int64_t twice) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * n, i = 0;
        v8 squares = {0};
        for (; i + 8 <= n; i += 8) {
            v8 part = eight(x, kind, at + i);
            squares += part * part;
        }
        float sum = sum_of(squares);
        for (; i < n; i++) sum = fmaf(one(x, kind, at + i), one(x, kind, at + i), sum);
        float scale = 1.0f / sqrtf(sum / n + eps);
        for (i = 0; i < n; i++) {
            float value = one(x, kind, at + i) * scale;
            if (twice && kind != FLOAT32) value = from_bfloat16(to_bfloat16(value));
            put(out, kind, at + i, value * (one(weight, kind, i) + offset));
        }
    }
}

typedef struct {
    int64_t kind, heads, kv_heads, width, places;  // of the cache (rows, kv_heads, places, width)
    void *keys, *values;
} Layer;

// softmax(cap(q k^T * scale)) v of one head: q and out (width,), keys and values (count, width).
static void head(
    const Layer *c, const float *q, const void *keys, const void *values, int64_t count,
    float scale, float cap, float *scores, void *out, int64_t at) {
    int64_t D = c->width;
    float most = -INFINITY, total = 0;
    for (int64_t s = 0; s < count; s++) {
        v8 sum = {0};
        int64_t d = 0;
        for (; d + 8 <= D; d += 8) sum += *(const v8 *)(q + d) * eight(keys, c->kind, s * D + d);
        float score = sum_of(sum);
        for (; d < D; d++) score = fmaf(q[d], one(keys, c->kind, s * D + d), score);
        score *= scale;
        if (cap > 0) score = cap * tanhf(score / cap);
        scores[s] = score;
        if (score > most) most = score;
    }
    for (int64_t s = 0; s < count; s++) total += scores[s] = expf(scores[s] - most);
    float mixed[D];
    memset(mixed, 0, sizeof mixed);
    for (int64_t s = 0; s < count; s++) {
        float share = scores[s] / total;
        int64_t d = 0;
        for (; d + 8 <= D; d += 8) *(v8 *)(mixed + d) += share * eight(values, c->kind, s * D + d);
        for (; d < D; d++) mixed[d] = fmaf(share, one(values, c->kind, s * D + d), mixed[d]);
    }
    for (int64_t d = 0; d < D; d++) put(out, c->kind, at + d, mixed[d]);
}

// out (width,) = x with its first `turning` values turned, pairs (i, i + turning / 2); float32.
static void turn(
    const Layer *c, const void *x, int64_t at, const void *cos, const void *sin, int64_t turning,
    int64_t row, float *out) {
    widen(x, c->kind, at, c->width, out);
    for (int64_t d = 0, half = turning / 2; d < half; d++) {
        int64_t near = row * turning + d, far = near + half;
        float a = out[d], b = out[d + half];
        out[d] = a * one(cos, c->kind, near) - b * one(sin, c->kind, near);
        out[d + half] = b * one(cos, c->kind, far) + a * one(sin, c->kind, far);
    }
}

// Put each row's key and value (rows, kv_heads, width) at place lengths[row] of its slot; then its
// query (rows, heads, width) over all places up to there, or the last `window` of them. Keys and
// queries are turned before, by cos and sin (rows, turning), unless `turning` is 0.
void attend(
    const Layer *c, const void *query, const void *key, const void *value, void *out,
    const int64_t *slots, const int64_t *lengths, const void *cos, const void *sin,
    int64_t turning, int64_t rows, int64_t window, float scale, float cap, int64_t threads) {
    int64_t D = c->width, group = c->heads / c->kv_heads, bytes = SIZE(c->kind);
#pragma omp parallel num_threads(threads)
    {
        float *scores = malloc(c->places * sizeof(float)), q[D];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * c->kv_heads; i++) {
            int64_t row = i / c->kv_heads, last = lengths[row], count = last + 1;
            int64_t from = window && count > window ? count - window : 0;
            int64_t at = (slots[row] * c->kv_heads + i % c->kv_heads) * c->places * D * bytes;
            char *keys = (char *)c->keys + at, *values = (char *)c->values + at;
            turn(c, key, i * D, cos, sin, turning, row, q);
            for (int64_t d = 0; d < D; d++) put(keys, c->kind, last * D + d, q[d]);
            memcpy(values + last * D * bytes, (char *)value + i * D * bytes, D * bytes);
            for (int64_t h = i * group; h < (i + 1) * group; h++) {
                turn(c, query, h * D, cos, sin, turning, row, q);
                head(c, q, keys + from * D * bytes, values + from * D * bytes, count - from, scale,
                     cap, scores, out, h * D);
            }
        }
        free(scores);
    }
}

// For the test that Python's structures are these.
const int64_t product_bytes = sizeof(Product), layer_bytes = sizeof(Layer);
