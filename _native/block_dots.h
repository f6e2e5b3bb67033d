/* Dot products of rows of blocks with activations of 8 bits, by what blocks.h has of a unit. Included
 * once a unit by kernels.h.
 */

/* The whole numbers of two parts of 32 of a block, from `part` on, as they are multiplied; of blocks
 * of 32 of this one and the next. */
INLINE NAME(weights) NAME(quants)(int format, const uint8_t *block, int part) {
    switch (format) {
#define CASE(code, name, ...) \
    case code: return NAME(quants_##name)(block, part);
        BLOCK_FORMATS(CASE)
#undef CASE
    }
    __builtin_unreachable();
}

/* The scale of a block that has one. */
INLINE float NAME(scale)(int format, const uint8_t *block) {
    float scale[16] = {0}, none[16];
    switch (format) {
#define CASE(code, name, values, ...) \
    case code: \
        if (values == BLOCK) NAME(scales_##name)(block, scale, none); \
        break;
        BLOCK_FORMATS(CASE)
#undef CASE
    }
    return scale[0];
}

/* Whether a block has one scale, which then is decoded where it is used. */
INLINE int NAME(one_scale)(int format) { return number_formats[format].block == BLOCK; }

/* Whether a block has what is decoded for SCALES_TOGETHER blocks of 32 at a time. */
INLINE int NAME(decodes)(int format) {
    return !NAME(one_scale)(format) || number_formats[format].minima;
}

/* What dots_8bit needs of SCALES_TOGETHER blocks of 32 of its rows. */
typedef struct {
    float scales[ROW_BLOCK_8BIT][2 * SCALES_TOGETHER], minima[ROW_BLOCK_8BIT][2 * SCALES_TOGETHER];
    float minus[ROW_BLOCK_8BIT][TOKEN_BLOCK][32]; /* lanes of minima times sums of activations */
} NAME(row_scales);

/* Adds the products of the minima that are decoded, those from block b on, to their lanes as `dots`
 * does. */
static __attribute__((noinline)) void NAME(add_minima)(int format, int rows, int count,
                                                       const activations *x, const int64_t *token,
                                                       int64_t b, NAME(row_scales) *s) {
    const int64_t each = scales_of_32(format);
    for (int k = 0; k < count; k++) {
        const float *sums = x->sums + (token[k] * x->room + b) * each;
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < SCALES_TOGETHER * each; i += 32)
                NAME(store)(s->minus[r][k],
                            NAME(fma)(NAME(load_f32)(s->minima[r] + i), NAME(load_f32)(sums + i),
                                      NAME(load_f32)(s->minus[r][k])));
    }
}

/* Decodes the scales and minima of the blocks from block b on. The minima before them are multiplied
 * only now: by then their stores are done, which are narrower than the loads. */
static __attribute__((noinline)) void NAME(next_scales)(
    int format, int rows, int count, const uint8_t *const *row, const activations *x,
    const int64_t *token, int64_t b, NAME(row_scales) *s) {
    const int64_t each = scales_of_32(format), left = x->d / BLOCK - b;
    const int64_t n = left < SCALES_TOGETHER ? left : SCALES_TOGETHER;
    if (b && number_formats[format].minima)
        NAME(add_minima)(format, rows, count, x, token, b - SCALES_TOGETHER, s);
    for (int r = 0; r < rows; r++) {
        if (NAME(one_scale)(format)) NAME(only_minima)(format, row[r], b, n, s->minima[r]);
        else NAME(scales)(format, row[r], b, n, s->scales[r], s->minima[r]);
        for (int64_t i = n * each; i < SCALES_TOGETHER * each; i++)
            s->scales[r][i] = s->minima[r][i] = 0;
    }
}

/* What dots_8bit does at two parts of each row's block; tokens point to theirs, and `scales` to those
 * of the block, from place `at` on, unless each part has one of its own. */
INLINE void NAME(add_two)(int format, int rows, int count, const uint8_t *const *block, int part,
                          const int8_t *const *q, const int32_t *const *less,
                          const float *const *x_scales, const NAME(row_scales) *scales, int64_t at,
                          NAME(lanes) sums[ROW_BLOCK_8BIT][TOKEN_BLOCK]) {
    const int each = scales_of_32(format), size = number_formats[format].bytes;
    NAME(weights) w[ROW_BLOCK_8BIT];
    NAME(pair_scales) w_scales[ROW_BLOCK_8BIT];
    for (int r = 0; r < rows; r++) {
        w[r] = NAME(quants)(format, block[r], part);
        if (!NAME(one_scale)(format)) w_scales[r] = NAME(pair)(format, scales->scales[r] + at);
        else if (format == MXFP4) w_scales[r] = NAME(two_powers)(block[r], block[r] + size);
        else w_scales[r] = NAME(two_halves)(block[r], block[r] + size);
    }
    for (int k = 0; k < count; k++) {
        NAME(pair_scales) of_x = NAME(pair)(format, x_scales[k] + part * each);
        for (int r = 0; r < rows; r++)
            sums[r][k] = NAME(add)(sums[r][k],
                                   NAME(products)(format, w[r], q[k] + part * BLOCK,
                                                  less[k] + part * BLOCK / 4),
                                   w_scales[r], of_x);
    }
}

/* out[r][k] = row[r] . activations of token[k], as `dots` for rows of blocks. */
INLINE void NAME(dots_8bit)(int format, int rows, int count, const uint8_t *const *row,
                            const uint8_t *const *coming, const activations *x,
                            const int64_t *token, float out[MOST_ROWS][TOKEN_BLOCK]) {
    const int64_t blocks = x->d / BLOCK, size = number_formats[format].bytes;
    const int64_t parts = number_formats[format].block / BLOCK, step = parts == 1 ? 2 : parts;
    const int each = scales_of_32(format), minima = number_formats[format].minima;
    NAME(lanes) sums[ROW_BLOCK_8BIT][TOKEN_BLOCK];
    NAME(row_scales) scales;
    const uint8_t *block[ROW_BLOCK_8BIT];
    const int8_t *q[TOKEN_BLOCK];
    const int32_t *less[TOKEN_BLOCK];
    const float *x_scales[TOKEN_BLOCK];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < count; k++) {
            sums[r][k] = NAME(no_lanes)();
            if (minima) NAME(store)(scales.minus[r][k], NAME(set)(0));
        }
    const int8_t *its_q[TOKEN_BLOCK];
    const int32_t *its_less[TOKEN_BLOCK];
    const float *its_scales[TOKEN_BLOCK];
    for (int k = 0; k < count; k++) {
        its_q[k] = x->q + token[k] * x->d, its_less[k] = x->less + token[k] * x->d / 4;
        its_scales[k] = x->scales + token[k] * x->room * each;
    }
    int64_t b = 0;
#define ADD(part) \
    NAME(add_two)(format, rows, count, block, part, q, less, x_scales, &scales, \
                  (b % SCALES_TOGETHER + part) * each, sums)
    for (; b + step <= blocks; b += step) {
        const int64_t offset = b / parts * size;
        if (NAME(decodes)(format) && b % SCALES_TOGETHER == 0)
            NAME(next_scales)(format, rows, count, row, x, token, b, &scales);
        for (int r = 0; r < rows; r++) {
            block[r] = row[r] + offset;
            if (parts > 1 || offset % 64 < 2 * size) __builtin_prefetch(coming[r] + offset, 0, 2);
            if (parts == 1 && size > 32) __builtin_prefetch(coming[r] + offset + size, 0, 2);
            for (int64_t line = 64; parts > 1 && line < size; line += 64)
                __builtin_prefetch(coming[r] + offset + line, 0, 2);
        }
        for (int k = 0; k < count; k++)
            q[k] = its_q[k] + b * BLOCK, less[k] = its_less[k] + b * 8,
            x_scales[k] = its_scales[k] + b * each;
        if (parts == 1) ADD(0);
        else if (count == 1) ADD(0), ADD(2), ADD(4), ADD(6); /* so that shifts are constant */
        else
            for (int part = 0; part < parts; part += 2) ADD(part);
    }
    if (parts == 1 && b < blocks) { /* the last one by itself, and zeros beside it */
        uint8_t padded[ROW_BLOCK_8BIT][2 * sizeof(block_of_32)] = {{0}};
        int8_t last_q[TOKEN_BLOCK][2 * BLOCK] = {{0}};
        int32_t last_less[TOKEN_BLOCK][16] = {{0}};
        if (NAME(decodes)(format) && b % SCALES_TOGETHER == 0)
            NAME(next_scales)(format, rows, count, row, x, token, b, &scales);
        for (int r = 0; r < rows; r++) block[r] = memcpy(padded[r], row[r] + b * size, size);
        for (int k = 0; k < count; k++) {
            q[k] = memcpy(last_q[k], its_q[k] + b * BLOCK, BLOCK);
            less[k] = memcpy(last_less[k], its_less[k] + b * 8, 32);
            x_scales[k] = its_scales[k] + b * each; /* and a zero */
        }
        ADD(0);
    }
#undef ADD
    if (minima && blocks)
        NAME(add_minima)(format, rows, count, x, token,
                         (blocks - 1) / SCALES_TOGETHER * SCALES_TOGETHER, &scales);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < count; k++) {
            out[r][k] = NAME(total)(sums[r][k]);
            if (minima) out[r][k] -= NAME(sum)(NAME(load_f32)(scales.minus[r][k]));
        }
}
