/* Dense and sparse products and attention, for the best vector unit that the CPU has.
 *
 * kernel_bodies.h is compiled once for each unit, from the number formats and activations in
 * formats.h; the choice is made at the first call.
 * FLASHINFER_VECTOR_UNIT={avx512vnni,avx512,avx2,neon_dotprod,neon,plain} forces one, to compare
 * them.
 */
#pragma once

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

#include "formats.h"
#include "unpack.h"

#define TOKEN_BLOCK 4   /* tokens that share one decoding of a row */
#define MOST_ROWS 4     /* rows that share one loading of tokens, at most */
#define ROW_PANEL 24    /* rows that meet a block of tokens while that is in the nearest cache */
/* Tokens from which on it pays to lay rows and them out in tiles, see tiles.h. */
#define MANY_TOKENS 16
#define MANY_TOKENS_8BIT TOKEN_BLOCK
#define ROUND_TOKENS 192 /* tokens that are laid out at a time */
#define PANEL_ROWS 24   /* rows that are laid out at a time, WHOLE_TILES */
#define MOST_TILE_TOKENS 6
#define WHOLE_TILES 12  /* rows, or tokens, that are whole tiles of every unit */
#define TILE_STEPS 64   /* of 32 columns, for which a tile's tokens stay in the nearest cache */
#define SCALE_STEPS 8   /* of two blocks, whose scales are multiplied at a time */
#define SCALES_TOGETHER 32 /* blocks of 32 whose scales are multiplied at a time */
#define PREFETCH_BYTES 12288 /* how far ahead of its use a row is fetched into the cache */
#define DOWN_TOGETHER 8 /* rows that one token's sums of the down projection meet at a time */
#define DOWN_AHEAD_BYTES 8192 /* how far ahead they are fetched */
#define DOWN_COLUMNS 128 /* columns, and rows, of the down projection decoded at a time */
#define DOWN_TOKENS 6 /* whose sums share the loading of decoded rows, where they use them all */
#define DOWN_ROWS 64

/* What tokens bring to products with blocks: x = q * scale in blocks of 32, rounded to 8 bits. */
typedef struct {
    int64_t d, room; /* room: d / 32, up to a multiple of SCALES_TOGETHER */
    int8_t *q;       /* (n_tokens, d) */
    int32_t *less;   /* (n_tokens, d / 4): what four q add too much where w is taken unsigned */
    float *scales;   /* (n_tokens, room * scales_of_32): of the format's groups */
    float *sums;     /* the same: of each group's x, what a minimum is multiplied with */
} activations;

/* Some of the tokens of an up_task, laid out by tiles.h. */
typedef struct {
    int64_t first, count;
    float *tiles, *scales, *sums; /* sums: of groups of x, where there are minima */
} tile_round;

INLINE int64_t steps_of(int64_t d) { return (d + 31) / 32; }
INLINE int64_t pairs_of(int64_t d) { return (d + 63) / 64; } /* of blocks */

/* Scales of a row or token as they are laid out, for whole SCALE_STEPS. */
INLINE int64_t scale_room(int format, int64_t d) {
    int64_t steps = (pairs_of(d) + SCALE_STEPS - 1) / SCALE_STEPS * SCALE_STEPS;
    return 2 * steps * scales_of_32(format);
}

/* Groups that share a scale, and a minimum, in a row; floats that the minima take, laid out. */
INLINE int64_t groups_of(int format, int64_t d) { return d / BLOCK * scales_of_32(format); }
INLINE int64_t minima_room(int format, int64_t d) {
    return number_formats[format].minima ? steps_of(groups_of(format, d)) * 32 : 0;
}

/* rows[i] . x[t] + bias[i], for all tokens or, with indptr, for tokens[indptr[i]:indptr[i+1]] */
typedef struct {
    const uint8_t *memory;
    const int64_t *rows; /* byte offset of each row, or NULL: every row_bytes */
    int64_t row_bytes, n_rows, d, n_tokens;
    int format;
    const float *x, *bias;
    const float *largest; /* of each token, where all of it is rounded alike; or NULL */
    const int32_t *indptr, *tokens;
    float *out; /* row i, token k at i * out_row + k * out_token; with indptr at indptr[i] + k */
    int64_t out_row, out_token;
    const activations *quantised; /* of x, where format is of blocks; run_up makes them */
    const tile_round *round; /* of many tokens, and for all rows; run_up makes them */
} up_task;

/* y[t] += a[i, t] * rows[i], i ascending */
typedef struct {
    const uint8_t *memory;
    const int64_t *rows;
    int64_t n_rows, d, n_tokens;
    int format;
    const float *a;
    const int32_t *indptr, *tokens;
    float *y;
} down_task;

typedef struct { /* of one token: its factors of DOWN_ROWS rows, and a bit for each not zero */
    uint64_t used;
    float a[DOWN_ROWS];
} down_panel;
#define ALL_OF(rows) (~(uint64_t)0 >> (DOWN_ROWS - (rows)))

typedef struct {
    const float *q; /* (n_tokens, n_heads, width), scaled */
    const uint8_t *keys, *values; /* (n_groups, context, width); n_heads / n_groups share one */
    int64_t n_tokens, n_heads, n_groups, width, context, start, window; /* window 0: all */
    int format, both; /* both: each token sees those after it, too */
    const float *bias; /* (n_heads, context), added to the scores, or NULL */
    float cap; /* scores become cap tanh(score / cap); 0: not */
    const float *sinks; /* (n_heads,): a learned extra softmax logit each (attention sink), or NULL */
    float *out; /* (n_tokens, n_heads, width) */
} attention_task;

/* Of each head and token: S = decay S; u = rate (v - S^T k), or rate v; S += k u^T; y = S^T q */
typedef struct {
    const float *q, *k; /* (n_tokens, n_groups, n); n_heads / n_groups share one */
    const float *v, *decay, *rate; /* (n_tokens, n_heads, width), (n_tokens, n_heads) twice */
    float *state; /* (n_heads, n, width) */
    int64_t n_tokens, n_heads, n_groups, n, width;
    int delta; /* what the state holds for k is taken away from v */
    float *y; /* (n_tokens, n_heads, width) */
} linear_attention_task;

/* Behind the last position that token t of a task sees. */
INLINE int64_t end_seen(const attention_task *task, int64_t t) {
    return task->start + (task->both ? task->n_tokens : t + 1);
}

INLINE float largest_of(const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* value, which is to be rounded to 8 bits, to the nearest whole number within 127, ties to even. */
INLINE float rounded_to_8_bits(float value) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    value = value >= -127.0f ? value : -127.0f; /* a NaN, too */
    value = value <= 127.0f ? value : 127.0f;
    return (value + magic) - magic;
}

/* One block of x as activations: q = x * 127 / largest, rounded to even; the sums of each four q and
 * of each of the block's groups, of which the compiler knows the number. */
INLINE void quantise_block(const float *x, float largest, const int groups, int8_t *q,
                           int32_t *fours, float *scales, float *sums) {
    enum { FOURS = BLOCK / 4 };
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int i = 0; i < BLOCK; i++) q[i] = (int8_t)rounded_to_8_bits(x[i] * inverse);
    for (int i = 0; i < FOURS; i++)
        fours[i] = q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3];
    for (int g = 0; g < groups; g++) {
        int32_t sum = 0;
        for (int i = g * FOURS / groups; i < (g + 1) * FOURS / groups; i++) sum += fours[i];
        scales[g] = largest / 127.0f, sums[g] = sum * (largest / 127.0f);
    }
}

/* One token's x (d,) as activations. `largest`: the scale of all of it is that of this number, or
 * NULL: each block has its own. */
INLINE void quantise(const float *x, int64_t d, const float *largest, int format, int8_t *q,
                     int32_t *less, float *scales, float *sums) {
    const int32_t zero = number_formats[format].zero;
    const int each = scales_of_32(format);
    for (int64_t b = 0; b < d / BLOCK; b++, x += BLOCK, q += BLOCK, less += BLOCK / 4) {
        float most = largest ? *largest : largest_of(x, BLOCK);
        if (each == 1) quantise_block(x, most, 1, q, less, scales + b, sums + b);
        else quantise_block(x, most, 2, q, less, scales + 2 * b, sums + 2 * b);
        for (int i = 0; i < BLOCK / 4; i++) less[i] *= -zero;
    }
}

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
INLINE float sum_of_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float f16c_half(const uint8_t *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(u16_at(p))));
}
#include "unpack_avx2.h"
#define UNIT_AVX2
#define NAME(x) PASTE(x, avx2)
#include "vectors.h"
#include "groups.h"
#include "blocks.h"
#include "block_dots.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "block_tiles.h"
#include "query_tiles.h"
#undef NAME
#undef UNIT_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif
#define UNIT_AVX512
#define UNIT_FLOATS
#define NAME(x) PASTE(x, avx512)
#include "vectors.h"
#include "groups.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "query_tiles.h"
#undef NAME
#undef UNIT_FLOATS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vnni,avx2,fma,f16c")
#endif
#define UNIT_VNNI
#define UNIT_EXTENDS
#define NAME(x) PASTE(x, avx512vnni)
#include "vectors.h"
#include "groups.h"
#include "blocks.h"
#include "block_dots.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "block_tiles.h"
#undef NAME
#undef UNIT_EXTENDS
#undef UNIT_VNNI
#undef UNIT_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#elif defined(__aarch64__)
#define UNIT_NEON
#define NAME(x) PASTE(x, neon)
#include "vectors.h"
#include "groups.h"
#include "blocks.h"
#include "block_dots.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "block_tiles.h"
#include "query_tiles.h"
#undef NAME
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define UNIT_DOTPROD
#define UNIT_EXTENDS
#define NAME(x) PASTE(x, neon_dotprod)
#include "vectors.h"
#include "groups.h"
#include "blocks.h"
#include "block_dots.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "block_tiles.h"
#undef NAME
#undef UNIT_EXTENDS
#undef UNIT_DOTPROD
#undef UNIT_NEON
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define UNIT_PLAIN
#define NAME(x) PASTE(x, plain)
#include "vectors.h"
#include "groups.h"
#include "blocks.h"
#include "block_dots.h"
#include "kernel_bodies.h"
#include "tiles.h"
#include "block_tiles.h"
#include "query_tiles.h"
#undef NAME
#undef UNIT_PLAIN

typedef struct {
    const char *name;
    void (*up)(const up_task *, int64_t, int64_t);
    void (*lay_out)(const up_task *, int64_t, int64_t);
    void (*up_tiles)(const up_task *, int64_t, int64_t, float *);
    void (*up_blocks)(const up_task *, int64_t, int64_t);
    void (*lay_out_blocks)(const up_task *, int64_t, int64_t);
    void (*up_tiles_8bit)(const up_task *, int64_t, int64_t, float *);
    void (*down)(const down_task *, int64_t, int64_t, down_panel *);
    void (*attend)(const attention_task *, int64_t, int64_t, float *);
    void (*attend_tiles)(const attention_task *, int64_t, int64_t, float *, int64_t);
    void (*activate)(float *, int64_t, int64_t, int, float);
    void (*linear_attention)(const linear_attention_task *, int64_t, int64_t);
} vector_unit;

/* A unit, the one that has all its functions but the products with blocks, and the one with these. */
#define UNIT(u, floats, blocks) \
    {#u, PASTE(up, floats), PASTE(lay_out, floats), PASTE(up_tiles, floats), \
     PASTE(up_blocks, blocks), PASTE(lay_out_blocks, blocks), PASTE(up_tiles_8bit, blocks), \
     PASTE(down, floats), PASTE(attend, floats), PASTE(attend_tiles, floats), \
     PASTE(activate, floats), PASTE(linear_attention, floats)}

static const vector_unit *best_unit(void) {
    static const vector_unit units[] = {
#if defined(__x86_64__)
        UNIT(avx512vnni, avx512, avx512vnni), UNIT(avx512, avx512, avx2), UNIT(avx2, avx2, avx2),
#elif defined(__aarch64__)
        UNIT(neon_dotprod, neon, neon_dotprod), UNIT(neon, neon, neon),
#endif
        UNIT(plain, plain, plain)};
    static const vector_unit *chosen = NULL;
    if (chosen) return chosen;
    const char *forced = getenv("FLASHINFER_VECTOR_UNIT");
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        int runs = 1;
#if defined(__x86_64__)
        if (!strncmp(units[i].name, "avx512", 6)) runs = __builtin_cpu_supports("avx512f");
        if (!strcmp(units[i].name, "avx512vnni"))
            runs = runs && __builtin_cpu_supports("avx512vnni") &&
                   __builtin_cpu_supports("avx512bw");
        if (strcmp(units[i].name, "plain"))
            runs = runs && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__) && defined(__linux__)
        if (!strcmp(units[i].name, "neon_dotprod"))
            runs = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
        if (!runs || (forced && *forced && strcmp(forced, units[i].name))) continue;
        return chosen = &units[i];
    }
    return chosen = &units[sizeof units / sizeof *units - 1];
}

/* Additions in 32 lanes, folded in halves: the same bits for any vector width. */
static float sum_in_lanes(const float *x, int64_t n, int squares) {
    float lanes[32] = {0};
    int64_t j = 0;
    for (; j + 32 <= n; j += 32)
        for (int i = 0; i < 32; i++) lanes[i] += squares ? x[j + i] * x[j + i] : x[j + i];
    for (int i = 0; j < n; i++, j++) lanes[i] += squares ? x[j] * x[j] : x[j];
    for (int m = 16; m; m /= 2)
        for (int i = 0; i < m; i++) lanes[i] += lanes[i + m];
    return lanes[0];
}

/* y = (x - mean) / sqrt(variance + epsilon), times weight, plus bias (NULL: neither), of one row */
static void layer_norm_row(const float *x, const float *weight, const float *bias, float epsilon,
                           int64_t n, float *y) {
    float mean = sum_in_lanes(x, n, 0) / n;
    for (int64_t j = 0; j < n; j++) y[j] = x[j] - mean;
    float spread = sqrtf(sum_in_lanes(y, n, 1) / n + epsilon);
    for (int64_t j = 0; j < n; j++) y[j] /= spread;
    for (int64_t j = 0; weight && j < n; j++) y[j] = y[j] * weight[j] + bias[j];
}

/* y = x / sqrt(mean of squares + epsilon), times weight (NULL: not), of one row */
static void rms_norm_row(const float *x, const float *weight, float epsilon, int64_t n, float *y) {
    float spread = sqrtf(sum_in_lanes(x, n, 1) / n + epsilon);
    for (int64_t j = 0; j < n; j++) y[j] = x[j] / spread;
    for (int64_t j = 0; weight && j < n; j++) y[j] *= weight[j];
}

/* 32 values as a block of q8_0: whole numbers, halves away from zero, of the largest magnitude /
 * 127. A NaN makes the whole block one; what is not finite beside an infinity becomes 0. */
static void to_q8_0(const float *x, uint8_t *block) {
    uint32_t bits[BLOCK], most = 0; /* of magnitudes, whose order they have: NaNs are largest */
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < BLOCK; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    float scale = float_of_bits(most) / 127.0f, inverse = scale == 0 ? 0.0f : 1.0f / scale;
    uint16_t half = f32_to_f16(scale);
    memcpy(block, &half, 2);
    for (int i = 0; i < BLOCK; i++) {
        float scaled = x[i] * inverse;
        scaled = fabsf(scaled) <= 128.0f ? scaled + copysignf(0.5f, scaled) : 0.0f;
        block[2 + i] = (uint8_t)(int8_t)scaled;
    }
}

/* x (n_tokens, n_groups, width) into a key/value cache (n_groups, context, row_bytes), from `start`
 * on. */
static void remember_rows(const float *x, int64_t n_tokens, int64_t n_groups, int64_t width,
                          uint8_t *cache, int64_t context, int64_t row_bytes, int64_t start,
                          int format) {
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t g = 0; g < n_groups; g++) {
            const float *from = x + (t * n_groups + g) * width;
            uint8_t *to = cache + (g * context + start + t) * row_bytes;
            if (format == F32) {
                memcpy(to, from, width * sizeof(float));
            } else if (format == F16) {
                for (int64_t i = 0; i < width; i++) ((uint16_t *)to)[i] = f32_to_f16(from[i]);
            } else {
                int64_t j = 0;
                for (; j + BLOCK <= width; j += BLOCK, to += bytes_of_32(Q8_0)) to_q8_0(from + j, to);
                float padded[BLOCK] = {0};
                memcpy(padded, from + j, (width - j) * sizeof(float));
                if (j < width) to_q8_0(padded, to);
            }
        }
}

/* Turn the pairs (i, i + half) of a head by the angles whose cos and sin are given. */
static void rotate_row(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

/* Split begin..end among threads in steps of `grain`; small jobs stay on this thread. */
#define SPLIT(threads, n, grain, call)                                                          \
    do {                                                                                        \
        int64_t grains_ = ((n) + (grain) - 1) / (grain), parts_ = (threads);                    \
        if (parts_ > grains_) parts_ = grains_;                                                 \
        _Pragma("omp parallel for num_threads((int)parts_) schedule(static, 1) if (parts_ > 1)") \
        for (int64_t part = 0; part < parts_; part++) {                                         \
            int64_t begin = grains_ * part / parts_ * (grain);                                  \
            int64_t end = grains_ * (part + 1) / parts_ * (grain);                              \
            if (end > (n)) end = (n);                                                           \
            call;                                                                               \
        }                                                                                       \
    } while (0)

#define SMALL_WORK 20000 /* multiply-adds below which waking another thread costs more */

/* run_up for many tokens: round after round of them is laid out and meets all rows. */
static int run_up_tiles(up_task *task, int threads) {
    const vector_unit *unit = best_unit();
    const int blocks = has_blocks(task->format);
    const int64_t d = task->d, most = task->n_tokens < ROUND_TOKENS ? task->n_tokens : ROUND_TOKENS;
    /* in floats: a token or row, which has as many bytes of whole numbers as values; sums */
    const int64_t pairs = pairs_of(d);
    const int64_t scales = blocks ? scale_room(task->format, d) : 0;
    const int64_t minima = blocks ? minima_room(task->format, d) : 0;
    const int64_t token = blocks ? pairs * 32 + scales + minima : steps_of(d) * 32;
    const int64_t row = blocks ? pairs * 16 + scales + minima : steps_of(d) * 32;
    const int64_t scratch = PANEL_ROWS * (row + MOST_TILE_TOKENS * 32);
    char *memory = malloc((most * token + threads * scratch) * sizeof(float) + 64);
    if (!memory) return -1;
    float *own = (float *)(memory + 64 - (uintptr_t)memory % 64), *tiles = own + threads * scratch;
    float *after = tiles + most * pairs * 32;
    tile_round round = {0, most, tiles, after, after + most * scales};
    task->round = &round;
    for (; round.first < task->n_tokens; round.first += most) {
        if (round.count > task->n_tokens - round.first) round.count = task->n_tokens - round.first;
        SPLIT(threads, round.count, WHOLE_TILES,
              (blocks ? unit->lay_out_blocks : unit->lay_out)(task, begin, end));
        SPLIT(threads, task->n_rows, WHOLE_TILES,
              (blocks ? unit->up_tiles_8bit : unit->up_tiles)(task, begin, end, own + part * scratch));
    }
    free(memory);
    return 0;
}

/* Returns 0, or -1 where there is no memory for the activations. */
static int run_up(up_task *task, int64_t products, int threads) {
    const vector_unit *unit = best_unit();
    activations x = {.d = task->d};
    if (products * task->d < SMALL_WORK) threads = 1;
    int blocks = has_blocks(task->format);
    if (!task->indptr && task->n_tokens >= (blocks ? MANY_TOKENS_8BIT : MANY_TOKENS))
        return run_up_tiles(task, threads);
    if (blocks) {
        const int64_t n = task->n_tokens * task->d;
        x.room = (task->d / BLOCK + SCALES_TOGETHER - 1) / SCALES_TOGETHER * SCALES_TOGETHER;
        const int64_t width = x.room * scales_of_32(task->format), scales = task->n_tokens * width;
        x.less = malloc(n + 8 * scales + n + 64); /* the four lie behind each other */
        if (!x.less) return -1;
        x.scales = (float *)(x.less + n / 4), x.sums = x.scales + scales;
        x.q = (int8_t *)(x.sums + scales);
        memset(x.scales, 0, 8 * scales);
        for (int64_t t = 0; t < task->n_tokens; t++)
            quantise(task->x + t * task->d, task->d, task->largest ? task->largest + t : NULL,
                     task->format, x.q + t * task->d, x.less + t * task->d / 4,
                     x.scales + t * width, x.sums + t * width);
        task->quantised = &x;
    }
    SPLIT(threads, task->n_rows, 1, (blocks ? unit->up_blocks : unit->up)(task, begin, end));
    free(x.less);
    return 0;
}

/* run_up with each token's x rounded to 8 bits, all of it with one scale. */
static int run_rounded_up(const up_task *task, int64_t products, int threads) {
    const int64_t n = task->n_tokens, d = task->d, of_x = has_blocks(task->format) ? 0 : n * d;
    float *largest = malloc((n + of_x) * sizeof(float)), *x = largest + n;
    if (!largest) return -1;
    for (int64_t t = 0; t < n; t++) {
        const float *its = task->x + t * d;
        const float most = largest_of(its, d);
        largest[t] = most > 1e-5f ? most : 1e-5f;
        const float inverse = 127.0f / largest[t], scale = largest[t] / 127.0f;
        for (int64_t i = 0; of_x && i < d; i++)
            x[t * d + i] = rounded_to_8_bits(its[i] * inverse) * scale;
    }
    up_task rounded = *task;
    rounded.largest = largest;
    if (of_x) rounded.x = x;
    int failed = run_up(&rounded, products, threads);
    free(largest);
    return failed;
}

/* Either of the two. */
static int run_products(up_task *task, int64_t products, int rounded, int threads) {
    return rounded ? run_rounded_up(task, products, threads) : run_up(task, products, threads);
}

/* Returns 0, or -1 where there is no memory for a panel's factors. */
static int run_down(const down_task *task, int64_t products, int threads) {
    const vector_unit *unit = best_unit();
    if (products * task->d < SMALL_WORK) threads = 1;
    int64_t room = task->n_tokens;
    down_panel *panels = malloc(sizeof *panels * threads * room + 1);
    if (!panels) return -1;
    SPLIT(threads, task->d, 64, unit->down(task, begin, end, panels + part * room));
    free(panels);
    return 0;
}

static void run_activate(float *x, int64_t n, int kind, float threshold, int threads) {
    const vector_unit *unit = best_unit();
    if (n * 8 < SMALL_WORK) threads = 1;
    SPLIT(threads, n, 64, unit->activate(x, begin, end, kind, threshold));
}

/* Room for a token's scores: all positions, in whole steps, and a vector behind them. */
INLINE int64_t score_room(const attention_task *task) {
    return (task->start + task->n_tokens + 63) / 32 * 32;
}

/* run_attention for many tokens, some of which meet the keys together. */
static int run_attention_tiles(const attention_task *task, int threads) {
    const vector_unit *unit = best_unit();
    int64_t tiles = (task->n_tokens + DOWN_TOKENS - 1) / DOWN_TOKENS, room = score_room(task);
    if (room < task->width) room = task->width; /* where the queries lie at first */
    int64_t scratch = PANEL_ROWS * MOST_TILE_TOKENS * 32 + (PANEL_ROWS + DOWN_TOKENS) * task->width;
    scratch += DOWN_TOKENS * room;
    char *memory = calloc(threads * scratch + 16, sizeof(float));
    if (!memory) return -1;
    float *own = (float *)(memory + 64 - (uintptr_t)memory % 64);
    SPLIT(threads, task->n_heads * tiles, 1,
          unit->attend_tiles(task, begin, end, own + part * scratch, room));
    free(memory);
    return 0;
}

/* Returns 0, or -1 where there is no memory for the scores. */
static int run_attention(const attention_task *task, int threads) {
    const vector_unit *unit = best_unit();
    int64_t items = task->n_tokens * task->n_heads, room = task->start + task->n_tokens + 32;
    if (items * room * task->width < SMALL_WORK) threads = 1;
    if (task->n_tokens >= DOWN_TOKENS) return run_attention_tiles(task, threads);
    float *scores = malloc(sizeof(float) * room * threads);
    if (!scores) return -1;
    SPLIT(threads, items, 1, unit->attend(task, begin, end, scores + part * room));
    free(scores);
    return 0;
}

static void run_linear_attention(const linear_attention_task *task, int threads) {
    const vector_unit *unit = best_unit();
    int64_t items = task->n_heads * steps_of(task->width);
    if (items * task->n_tokens * task->n * 32 < SMALL_WORK) threads = 1;
    SPLIT(threads, items, 1, unit->linear_attention(task, begin, end));
}
