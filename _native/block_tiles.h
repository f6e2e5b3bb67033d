/* Products of many tokens with rows of blocks, tile by tile as in tiles.h. Included once a unit by
 * kernels.h.
 *
 * The whole numbers meet as in dots_8bit; minima, which are floats, meet the sums of activations in
 * tiles of floats.
 */

/* Where value i of the r-th of `each` rows, or tokens, lies in a tile of floats of so many steps:
 * (group of lanes, step, row, lane). */
INLINE float *NAME(in_tile)(float *tile, int64_t steps, int64_t each, int64_t r, int64_t i) {
    return tile + ((i % 32 / LANES * steps + i / 32) * each + r) * LANES + i % LANES;
}

/* A tile of tokens from the k-th on, rounded to 8 bits, as (group, step, token, {q, less}), where a
 * step is two blocks, their scales as (half, token, step), and where the weights have minima the
 * sums of their groups as floats. */
INLINE void NAME(lay_out_8bit)(const up_task *task, const int each, int64_t k, int64_t count,
                               uint8_t *tile, float *scales, float *sums) {
    const int format = task->format, minima = number_formats[format].minima;
    const int64_t pairs = pairs_of(task->d), width = scale_room(format, task->d) / HALVES_8BIT;
    const int64_t steps = steps_of(groups_of(format, task->d)), apart = pairs * count * 2 * GROUP_8BIT;
    memset(scales, 0, count * scale_room(format, task->d) * sizeof(float));
    memset(sums, 0, count * minima_room(format, task->d) * sizeof(float));
    for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < pairs; s++) {
            int8_t q[2 * BLOCK] = {0};
            int32_t less[16] = {0};
            float both[4] = {0}, both_sums[4] = {0};
            int64_t n = task->d - s * 64 < 64 ? BLOCK : 2 * BLOCK;
            quantise(task->x + (k + t) * task->d + s * 64, n,
                     task->largest ? task->largest + k + t : NULL, format, q, less, both, both_sums);
            uint8_t *to = tile + (s * count + t) * 2 * GROUP_8BIT;
            if (each == 1) {
                NAME(spread)(Q8_0, q, to, apart), NAME(spread)(Q8_0, less, to + GROUP_8BIT, apart);
            } else {
                NAME(spread)(Q6_K, q, to, apart), NAME(spread)(Q6_K, less, to + GROUP_8BIT, apart);
            }
            for (int i = 0; i < 2 * each; i++) {
                int64_t half = HALVES_8BIT == 2 ? i / each : 0;
                int64_t at = HALVES_8BIT == 2 ? s * each + i % each : 2 * s * each + i;
                scales[(half * count + t) * width + at] = both[i];
                if (minima) *NAME(in_tile)(sums, steps, count, t, 2 * s * each + i) = both_sums[i];
            }
        }
}

/* Where the first scale of row r of a panel is. */
INLINE int64_t NAME(scales_at)(int format, int64_t d, int64_t r) {
    const int64_t room = scale_room(format, d);
    return r / TILE_ROWS_8BIT * TILE_ROWS_8BIT * room + r % TILE_ROWS_8BIT * (room / HALVES_8BIT);
}

/* The scales of row r of a panel, in tiles of (half, row, step), and its minima in tiles of floats. */
static __attribute__((noinline)) void NAME(decode_scales)(const up_task *task, const int each, const uint8_t *row, int64_t r,
                                float *scales, float *minima) {
    const int format = task->format, least = number_formats[format].minima;
    const int64_t blocks = task->d / BLOCK, width = scale_room(format, task->d) / HALVES_8BIT;
    const int64_t steps = steps_of(groups_of(format, task->d));
    float *to = scales + NAME(scales_at)(format, task->d, r);
    float *tile = minima + r / TILE_ROWS * TILE_ROWS * steps * 32;
    for (int64_t b = 0; b < blocks; b += SCALES_TOGETHER) {
        float found[2 * SCALES_TOGETHER], its_minima[2 * SCALES_TOGETHER] = {0};
        int64_t n = blocks - b < SCALES_TOGETHER ? blocks - b : SCALES_TOGETHER;
        NAME(scales)(format, row, b, n, found, its_minima);
        if (HALVES_8BIT == 1) memcpy(to + b * each, found, n * each * sizeof(float));
        else
            for (int64_t j = 0; j < n * each; j++)
                to[j / each % 2 * TILE_ROWS_8BIT * width + (b + j / each) / 2 * each + j % each] =
                    found[j];
        for (int64_t j = 0; least && j < n * each; j += LANES)
            memcpy(NAME(in_tile)(tile, steps, TILE_ROWS, r % TILE_ROWS, b * each + j),
                   its_minima + j, LANES * sizeof(float));
    }
}

/* A panel of `rows` rows, from row i on: the whole numbers in tiles of (group, step, row), and what
 * decode_scales gives. Rows behind `end` are the last one. The next rows are fetched into the
 * cache. */
INLINE void NAME(decode_panel)(const up_task *task, int format, int64_t i, int64_t rows, int64_t end,
                               uint8_t *w, float *scales, float *minima) {
    const int64_t blocks = task->d / BLOCK, pairs = pairs_of(task->d);
    const int64_t parts = number_formats[format].block / BLOCK;
    const int64_t width = scale_room(format, task->d) / HALVES_8BIT;
    uint8_t padded[2 * sizeof(block_of_32)] = {0};
    memset(scales, 0, PANEL_ROWS * scale_room(format, task->d) * sizeof(float));
    memset(minima, 0, PANEL_ROWS * minima_room(format, task->d) * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        int64_t later = i + r + TILE_ROWS_8BIT < end ? i + r + TILE_ROWS_8BIT : end - 1;
        const uint8_t *row = NAME(row_at)(task, i + r < end ? i + r : end - 1);
        const uint8_t *coming = NAME(row_at)(task, later);
        uint8_t *tile = w + r / TILE_ROWS_8BIT * TILE_ROWS_8BIT * pairs * 64;
        float *its_scales = scales + NAME(scales_at)(format, task->d, r);
        for (int64_t s = 0; s < pairs; s++) {
            const uint8_t *block = row + 2 * s / parts * number_formats[format].bytes;
            __builtin_prefetch(coming + bytes_before(format, 64 * s), 0, 2);
            if (parts == 1 && 2 * s + 1 == blocks) /* the last one, and zeros beside it */
                block = memcpy(padded, block, number_formats[format].bytes);
            NAME(weights) q = NAME(quants)(format, block, 2 * s % parts);
            NAME(spread)(format, &q, tile + (s * TILE_ROWS_8BIT + r % TILE_ROWS_8BIT) * GROUP_8BIT,
                         pairs * TILE_ROWS_8BIT * GROUP_8BIT);
            for (int b = 0; !NAME(decodes)(format) && b < 2; b++)
                its_scales[HALVES_8BIT == 2 ? b * TILE_ROWS_8BIT * width + s : 2 * s + b] =
                    NAME(scale)(format, block + b * number_formats[format].bytes);
        }
        if (!NAME(decodes)(format)) continue;
        if (scales_of_32(format) == 1) NAME(decode_scales)(task, 1, row, r, scales, minima);
        else NAME(decode_scales)(task, 2, row, r, scales, minima);
    }
}

/* sums[r][k] = w[r] . x[k] for one group of lanes. The products of scales are made SCALE_STEPS at
 * a time; of each step's, those from `place` on are the group's. `count` is known to the
 * compiler. */
INLINE void NAME(tile_8bit)(int format, int count, const uint8_t *w, const float *w_scales,
                            const uint8_t *x, const float *x_scales, int64_t steps, int64_t width,
                            int64_t place, float *sums) {
    enum { TOGETHER = SCALE_STEPS * 2 / HALVES_8BIT };
    const int each = scales_of_32(format), each_step = 2 * each / HALVES_8BIT;
    NAME(lanes_8bit) sum[TILE_ROWS_8BIT][TILE_TOKENS_8BIT];
    NAME(row_8bit) row[TILE_ROWS_8BIT];
    float scales[TILE_ROWS_8BIT][TILE_TOKENS_8BIT][2 * TOGETHER] __attribute__((aligned(64)));
    for (int r = 0; r < TILE_ROWS_8BIT; r++)
        for (int k = 0; k < count; k++) sum[r][k] = NAME(zero_8bit)();
    for (int64_t first = 0; first < steps; first += SCALE_STEPS) {
        int64_t n = steps - first < SCALE_STEPS ? steps - first : SCALE_STEPS;
        for (int r = 0; r < TILE_ROWS_8BIT; r++)
            for (int k = 0; k < count; k++)
                for (int e = 0; e < each * TOGETHER; e += TOGETHER)
                    NAME(multiply_8bit)(w_scales + r * width + first * each_step + e,
                                        x_scales + k * width + first * each_step + e,
                                        scales[r][k] + e);
        for (int64_t s = 0; s < n; s++) {
            for (int r = 0; r < TILE_ROWS_8BIT; r++)
                row[r] = NAME(load_row_8bit)(w + r * GROUP_8BIT);
            for (int k = 0; k < count; k++)
                for (int r = 0; r < TILE_ROWS_8BIT; r++)
                    sum[r][k] = NAME(fma_8bit)(format, row[r], x + k * 2 * GROUP_8BIT,
                                               scales[r][k] + s * each_step + place, sum[r][k]);
            w += TILE_ROWS_8BIT * GROUP_8BIT, x += count * 2 * GROUP_8BIT;
        }
    }
    for (int r = 0; r < TILE_ROWS_8BIT; r++)
        for (int k = 0; k < count; k++)
            NAME(store_8bit)(format, sums + (k * PANEL_ROWS + r) * 16, sum[r][k]);
}

/* The 8 bit products of a decoded panel with a tile of `count` tokens, for all groups of lanes.
 * Formats of equal groups are multiplied alike, as the one that `like` is. */
INLINE void NAME(panel_8bit)(int like, int64_t d, const uint8_t *w, const float *w_scales,
                             const uint8_t *x, const float *x_scales, int64_t rows, int64_t count,
                             float *sums) {
    const int64_t pairs = pairs_of(d), room = scale_room(like, d), width = room / HALVES_8BIT;
    for (int g = 0; g < 64 / GROUP_8BIT; g++)
        for (int64_t r = 0; r < rows; r += TILE_ROWS_8BIT) {
            const uint8_t *tile = w + r * pairs * 64 + g * pairs * TILE_ROWS_8BIT * GROUP_8BIT;
            const uint8_t *tokens = x + g * pairs * count * 2 * GROUP_8BIT;
            const int64_t half = g * HALVES_8BIT * GROUP_8BIT / 64;
            const int64_t place = scales_of_32(like) == 2 && GROUP_8BIT == 16 ? g % 2 : 0;
            const float *its_scales = w_scales + r * room + half * TILE_ROWS_8BIT * width;
            const float *their_scales = x_scales + half * count * width;
            float *to = sums + r * 16 + g * GROUP_8BIT / 4;
#define TILE(known) \
    NAME(tile_8bit)(like, known, tile, its_scales, tokens, their_scales, pairs, width, place, to)
            COUNTED(TILE, TILE_TOKENS_8BIT)
#undef TILE
        }
}

/* As up_tiles_format, for blocks of 8 bits. */
static void NAME(up_tiles_8bit)(const up_task *task, int64_t begin, int64_t end, float *scratch) {
    const int format = task->format, each = scales_of_32(format);
    const int64_t d = task->d, pairs = pairs_of(d), room = scale_room(format, d);
    const int64_t groups = groups_of(format, d), least = minima_room(format, d);
    const tile_round *round = task->round;
    float *sums = scratch, *scales = sums + PANEL_ROWS * MOST_TILE_TOKENS * 32;
    float *minima = scales + PANEL_ROWS * room;
    uint8_t *w = (uint8_t *)(minima + PANEL_ROWS * least);
    for (int64_t i = begin; i < end; i += PANEL_ROWS) {
        int64_t rows = end - i < PANEL_ROWS ? end - i : PANEL_ROWS;
        int64_t whole = (rows + WHOLE_TILES - 1) / WHOLE_TILES * WHOLE_TILES;
        switch (format) {
#define CASE(code, ...) \
    case code: NAME(decode_panel)(task, code, i, whole, end, w, scales, minima); break;
            BLOCK_FORMATS(CASE)
#undef CASE
        }
        for (int64_t k = 0; k < round->count; k += TILE_TOKENS_8BIT) {
            float minus[MOST_TILE_TOKENS * PANEL_ROWS] __attribute__((aligned(64)));
            const uint8_t *x = (const uint8_t *)round->tiles + k * pairs * 128;
            const float *x_scales = round->scales + k * room;
            int64_t left = round->count - k;
            int64_t count = left < TILE_TOKENS_8BIT ? left : TILE_TOKENS_8BIT;
            if (least) {
                NAME(panel)(minima, round->sums + k * least, rows, count, groups, sums);
                NAME(fold)(sums, 32, count, minus);
            }
            if (each == 2)
                NAME(panel_8bit)(Q6_K, d, w, scales, x, x_scales, rows, count, sums);
            else if (number_formats[format].zero == number_formats[Q8_0].zero)
                NAME(panel_8bit)(Q8_0, d, w, scales, x, x_scales, rows, count, sums);
            else
                NAME(panel_8bit)(Q4_0, d, w, scales, x, x_scales, rows, count, sums);
            NAME(fold_tile)(task, sums, 16, least ? minus : NULL, i, rows, round->first + k, count);
        }
    }
}

/* Lays out a round's tokens begin..end, whole tiles. */
static void NAME(lay_out_blocks)(const up_task *task, int64_t begin, int64_t end) {
    const tile_round *round = task->round;
    for (int64_t k = begin; k < end; k += TILE_TOKENS_8BIT) {
        int64_t count = end - k < TILE_TOKENS_8BIT ? end - k : TILE_TOKENS_8BIT;
        uint8_t *tile = (uint8_t *)round->tiles + k * pairs_of(task->d) * 128;
        float *scales = round->scales + k * scale_room(task->format, task->d);
        float *sums = round->sums + k * minima_room(task->format, task->d);
        if (scales_of_32(task->format) == 1)
            NAME(lay_out_8bit)(task, 1, round->first + k, count, tile, scales, sums);
        else
            NAME(lay_out_8bit)(task, 2, round->first + k, count, tile, scales, sums);
    }
}
