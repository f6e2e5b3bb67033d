/* Products of all rows with many tokens, tile by tile. Included once a unit by kernels.h.
 *
 * A panel of rows is decoded once and meets every token of a round. Both are laid out as the
 * registers take them: a tile of TILE_ROWS rows and at most TILE_TOKENS tokens has one register of
 * sums for each pair. The lanes of a sum (32 of them, or 16 with blocks) are more than one
 * register holds; the groups of lanes, which do not depend on each other, take turns. Each lane
 * adds what it adds in `dots` and `dots_8bit`, in the same order: the same bits.
 */

/* Adds the n lanes of each of 16 sums as `sum` and `total` do. */
#if defined(UNIT_AVX512)
INLINE __m512 NAME(halves)(__m512 x, __m512 y, const int of) { /* of each 128 bits, or of each 64 */
    return of ? _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee))
              : _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}
INLINE void NAME(fold_16)(const float *sums, int n, float *out) {
    __m512 v[16];
    for (int i = 0; i < 16; i++) {
        const float *lanes = sums + (i % 4 * 4 + i / 4) * n; /* in the order of the last line */
        v[i] = _mm512_load_ps(lanes);
        if (n == 32) v[i] = _mm512_add_ps(v[i], _mm512_load_ps(lanes + 16));
    }
    for (int i = 0; i < 8; i++) /* from 16 lanes to 8 of two sums each */
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    v[0] = NAME(halves)(v[0], v[1], 1), v[1] = NAME(halves)(v[2], v[3], 1);
    _mm512_store_ps(out, NAME(halves)(v[0], v[1], 0));
}
#elif defined(UNIT_AVX2)
INLINE void NAME(fold_16)(const float *sums, int n, float *out) {
    for (int at = 0; at < 16; at += 8) {
        __m256 v[8];
        for (int i = 0; i < 8; i++) {
            const float *lanes = sums + (at + i % 2 * 4 + i / 2) * n; /* in the last line's order */
            __m256 s[4];
            for (int g = 0; g < n / 8; g++) s[g] = _mm256_load_ps(lanes + 8 * g);
            if (n == 32) s[0] = _mm256_add_ps(s[0], s[2]), s[1] = _mm256_add_ps(s[1], s[3]);
            v[i] = _mm256_add_ps(s[0], s[1]);
        }
        for (int i = 0; i < 4; i++) /* from 8 lanes to 4 of two sums each */
            v[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x20),
                                 _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x31));
        for (int i = 0; i < 2; i++)
            v[i] = _mm256_add_ps(_mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44),
                                 _mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee));
        _mm256_store_ps(out + at, _mm256_add_ps(_mm256_shuffle_ps(v[0], v[1], 0x88),
                                                _mm256_shuffle_ps(v[0], v[1], 0xdd)));
    }
}
#else
INLINE void NAME(fold_16)(const float *sums, int n, float *out) {
    for (int i = 0; i < 16; i++) {
        float lanes[32];
        memcpy(lanes, sums + i * n, n * sizeof(float));
        for (int m = n / 2; m; m /= 2)
            for (int k = 0; k < m; k++) lanes[k] += lanes[k + m];
        out[i] = lanes[0];
    }
}
#endif

/* Folds the sums (count, PANEL_ROWS, lanes) of a panel with a tile of tokens. */
INLINE void NAME(fold)(const float *sums, int lanes, int64_t count, float *out) {
    for (int64_t n = 0; n < count * PANEL_ROWS; n += 16)
        NAME(fold_16)(sums + n * lanes, lanes, out + n);
}

/* The products of a panel's rows, from row i on, with tokens first..first + count, out of their
 * sums as `fold` takes them; less what `minus`, which is folded already, has for each. */
INLINE void NAME(fold_tile)(const up_task *task, const float *sums, int lanes, const float *minus,
                            int64_t i, int64_t rows, int64_t first, int64_t count) {
    float folded[MOST_TILE_TOKENS * PANEL_ROWS] __attribute__((aligned(64)));
    NAME(fold)(sums, lanes, count, folded);
    for (int64_t k = 0; k < count; k++) {
        float *from = folded + k * PANEL_ROWS;
        float *out = task->out + i * task->out_row + (first + k) * task->out_token;
        for (int64_t r = 0; minus && r < rows; r++) from[r] -= minus[k * PANEL_ROWS + r];
        for (int64_t r = 0; r < rows; r++) from[r] += task->bias ? task->bias[i + r] : 0.0f;
        if (task->out_row == 1) memcpy(out, from, rows * sizeof(float));
        else
            for (int64_t r = 0; r < rows; r++) out[r * task->out_row] = from[r];
    }
}

/* call(count), where count is known to the compiler and at most `most`. */
#define COUNTED(call, most) \
    switch (count) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(most < 4 ? most : 4); break; \
    case 5: call(most < 5 ? most : 5); break; \
    default: call(most); \
    }

/* Where row i of the weights lies. */
INLINE const uint8_t *NAME(row_at)(const up_task *task, int64_t i) {
    return task->memory + (task->rows ? task->rows[i] : i * task->row_bytes);
}

/* A tile of tokens from the k-th on as (group of lanes, step, token, lane); d is padded to whole
 * steps of 32 with zeros. */
INLINE void NAME(lay_out_floats)(const up_task *task, int64_t k, int64_t count, float *tile) {
    const int64_t steps = steps_of(task->d);
    for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < steps; s++) {
            const uint8_t *x = (const uint8_t *)(task->x + (k + t) * task->d);
            int64_t n = task->d - s * 32;
            V v = n < 32 ? NAME(load_tail)(F32, x, s * 32, n) : NAME(load)(F32, x, s * 32);
            for (int g = 0; g < 32 / LANES; g++)
                NAME(store_lanes)(tile + ((g * steps + s) * count + t) * LANES, NAME(lanes_of)(v, g));
        }
}

/* A tile of rows from row i on, decoded, as lay_out_floats; rows behind `end` are the last
 * one. The rows of the next tile are fetched into the cache. */
INLINE void NAME(decode_tile)(const up_task *task, int format, int64_t i, int64_t end, float *tile) {
    const int64_t steps = steps_of(task->d), size = bytes_of_32(format);
    const uint8_t *row[TILE_ROWS], *coming[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) {
        int64_t later = i + r + TILE_ROWS < end ? i + r + TILE_ROWS : end - 1;
        row[r] = NAME(row_at)(task, i + r < end ? i + r : end - 1);
        coming[r] = NAME(row_at)(task, later);
    }
    for (int64_t s = 0; s < steps; s++, tile += TILE_ROWS * LANES)
        for (int r = 0; r < TILE_ROWS; r++) {
            int64_t n = task->d - s * 32;
            __builtin_prefetch(coming[r] + s * size, 0, 2);
            V v = n < 32 ? NAME(load_tail)(format, row[r], s * 32, n)
                         : NAME(load)(format, row[r], s * 32);
            for (int g = 0; g < 32 / LANES; g++)
                NAME(store_lanes)(tile + (g * steps * TILE_ROWS + r) * LANES, NAME(lanes_of)(v, g));
        }
}

/* sums[r][k] += w[r] . x[k] over `steps` steps, for one group of lanes; both as they are laid out.
 * `count` is known to the compiler. Sums begin at 0 where `fresh`. */
INLINE void NAME(tile)(int count, const float *w, const float *x, int64_t steps, int fresh,
                       float *sums) {
    NAME(lane_group) sum[TILE_ROWS][TILE_TOKENS], row[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int k = 0; k < count; k++)
            sum[r][k] = fresh ? NAME(set_lanes)(0) : NAME(load_lanes)(sums + (k * PANEL_ROWS + r) * 32);
    for (int64_t s = 0; s < steps; s++, w += TILE_ROWS * LANES, x += count * LANES) {
        for (int r = 0; r < TILE_ROWS; r++) row[r] = NAME(load_lanes)(w + r * LANES);
        for (int k = 0; k < count; k++) {
            NAME(lane_group) values = NAME(load_lanes)(x + k * LANES);
            for (int r = 0; r < TILE_ROWS; r++)
                sum[r][k] = NAME(fma_lanes)(row[r], values, sum[r][k]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int k = 0; k < count; k++) NAME(store_lanes)(sums + (k * PANEL_ROWS + r) * 32, sum[r][k]);
}

/* A decoded panel w of `rows` rows with a tile x of `count` tokens. A group's part of the tokens
 * stays in the nearest cache while the rows pass. */
static void NAME(panel)(const float *w, const float *x, int64_t rows, int64_t count, int64_t d,
                        float *sums) {
    const int64_t steps = steps_of(d);
    for (int64_t s = 0; s < steps; s += TILE_STEPS)
        for (int g = 0; g < 32 / LANES; g++)
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                const float *tile = w + r * steps * 32 + (g * steps + s) * TILE_ROWS * LANES;
                const float *tokens = x + (g * steps + s) * count * LANES;
                int64_t n = steps - s < TILE_STEPS ? steps - s : TILE_STEPS;
                float *to = sums + r * 32 + g * LANES;
#define TILE(known) NAME(tile)(known, tile, tokens, n, s == 0, to)
                COUNTED(TILE, TILE_TOKENS)
#undef TILE
            }
}

/* Rows begin..end with the tokens of a round, which are laid out in task->tiles. */
INLINE void NAME(up_tiles_format)(const up_task *task, int format, int64_t begin, int64_t end,
                                  float *scratch) {
    const int64_t padded = steps_of(task->d) * 32;
    float *sums = scratch, *w = sums + PANEL_ROWS * MOST_TILE_TOKENS * 32;
    const tile_round *round = task->round;
    for (int64_t i = begin; i < end; i += PANEL_ROWS) {
        int64_t rows = end - i < PANEL_ROWS ? end - i : PANEL_ROWS;
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            NAME(decode_tile)(task, format, i + r, end, w + r * padded);
        for (int64_t k = 0; k < round->count; k += TILE_TOKENS) {
            int64_t left = round->count - k, count = left < TILE_TOKENS ? left : TILE_TOKENS;
            NAME(panel)(w, round->tiles + k * padded, rows, count, task->d, sums);
            NAME(fold_tile)(task, sums, 32, NULL, i, rows, round->first + k, count);
        }
    }
}

#ifndef UNIT_EXTENDS

/* Lays out a round's tokens begin..end, whole tiles. */
static void NAME(lay_out)(const up_task *task, int64_t begin, int64_t end) {
    const tile_round *round = task->round;
    for (int64_t k = begin; k < end; k += TILE_TOKENS) {
        int64_t count = end - k < TILE_TOKENS ? end - k : TILE_TOKENS;
        NAME(lay_out_floats)(task, round->first + k, count,
                             round->tiles + k * steps_of(task->d) * 32);
    }
}

/* Rows begin..end with the tokens of a round, which are laid out. */
static void NAME(up_tiles)(const up_task *task, int64_t begin, int64_t end, float *scratch) {
    switch (task->format) {
#define CASE(code, ...) \
    case code: NAME(up_tiles_format)(task, code, begin, end, scratch); break;
        FLOAT_FORMATS(CASE)
#undef CASE
    }
}

#endif
