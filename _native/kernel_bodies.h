/* The kernels over a range of rows, columns or heads. Included once a vector unit by kernels.h.
 *
 * Order of additions (the bits contract): a dot product adds into 32 lanes along the row and
 * then folds the lanes in halves; the down projection adds neurons one after the other. Neither
 * depends on how many rows, tokens or threads there are. Products with blocks take
 * activations of 8 bits, see blocks.h.
 */

/* 32 values of a row of weights from column j, a multiple of 32, as float32. Of the formats of
 * blocks q8_0 and q4_0 have a loader; decode_blocks is for all of them. */
INLINE V NAME(load)(int format, const uint8_t *row, int64_t j) {
    switch (format) {
#define CASE(code, name, block, bytes) \
    case code: return NAME(load_##name)((const void *)(row + j * bytes));
        FLOAT_FORMATS(CASE)
#undef CASE
    case Q8_0: return NAME(load_q8_0)(row, j / BLOCK);
    case Q4_0: return NAME(load_q4_0)(row, j / BLOCK);
    }
    __builtin_unreachable();
}

INLINE int NAME(has_loader)(int format) { return format <= Q4_0; }

/* The last n < 32 values, with zeros behind them; rows of blocks have no such. */
INLINE V NAME(load_tail)(int format, const uint8_t *row, int64_t j, int64_t n) {
    float padded[32] = {0};
    if (has_blocks(format)) __builtin_unreachable();
    int64_t size = bytes_of_32(format) / 32;
    memcpy(padded, row + j * size, n * size);
    return NAME(load)(format, (const uint8_t *)padded, 0);
}

/* out[r][k] = row[r] . x[token[k]] for `rows` rows and `count` tokens. Meanwhile the rows `coming`
 * are fetched into the cache: rows are too short and too far apart for the CPU to foresee them. */
INLINE void NAME(dots)(int format, int rows, int count, const uint8_t *const *row,
                       const uint8_t *const *coming, const float *x, const int64_t *token,
                       int64_t d, float out[MOST_ROWS][TOKEN_BLOCK]) {
    V sums[ROW_BLOCK][TOKEN_BLOCK], w[ROW_BLOCK];
    int64_t j = 0;
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < count; k++) sums[r][k] = NAME(set)(0);
    for (; j + 32 <= d; j += 32) {
        for (int r = 0; r < rows; r++) {
            w[r] = NAME(load)(format, row[r], j);
            __builtin_prefetch(coming[r] + bytes_before(format, j), 0, 2);
        }
        for (int k = 0; k < count; k++) {
            V values = NAME(load_f32)(x + token[k] * d + j);
            for (int r = 0; r < rows; r++) sums[r][k] = NAME(fma)(w[r], values, sums[r][k]);
        }
    }
    if (j < d) {
        for (int r = 0; r < rows; r++) w[r] = NAME(load_tail)(format, row[r], j, d - j);
        for (int k = 0; k < count; k++) {
            V values = NAME(load_tail)(F32, (const uint8_t *)(x + token[k] * d), j, d - j);
            for (int r = 0; r < rows; r++) sums[r][k] = NAME(fma)(w[r], values, sums[r][k]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < count; k++) out[r][k] = NAME(sum)(sums[r][k]);
}

/* The products of `rows` neighbouring rows, from row i on, with `count` tokens, from the k-th of
 * row i's on. Both counts are known to the compiler. */
INLINE void NAME(up_block)(const up_task *task, int format, int rows, int count,
                           const uint8_t *const *row, const uint8_t *const *coming, int64_t i,
                           int64_t k) {
    float out[MOST_ROWS][TOKEN_BLOCK], *result = task->out + i * task->out_row;
    int64_t token[TOKEN_BLOCK];
    for (int b = 0; b < count; b++) token[b] = k + b;
    if (task->indptr) {
        result = task->out + task->indptr[i];
        for (int b = 0; b < count; b++) token[b] = task->tokens[task->indptr[i] + k + b];
    }
    if (!has_blocks(format))
        NAME(dots)(format, rows, count, row, coming, task->x, token, task->d, out);
#ifndef UNIT_FLOATS
    else
        NAME(dots_8bit)(format, rows, count, row, coming, task->quantised, token, out);
#endif
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < count; b++)
            result[r * task->out_row + (k + b) * task->out_token] =
                out[r][b] + (task->bias ? task->bias[i + r] : 0.0f);
}

/* Rows begin..end of weights . x, each row for the tokens that ask for it. Where all tokens ask
 * for all rows, a panel of rows meets a block of tokens after the other, and so each is read from
 * the nearest cache. */
INLINE void NAME(up_format)(const up_task *task, int format, int64_t begin, int64_t end) {
    const uint8_t *row[ROW_PANEL], *coming[ROW_PANEL];
#ifdef UNIT_FLOATS
    const int most = ROW_BLOCK;
#else
    const int most = has_blocks(format) ? ROW_BLOCK_8BIT : ROW_BLOCK;
#endif
    int64_t ahead = 1 + PREFETCH_BYTES / (bytes_before(format, task->d) + 1);
    /* With few tokens some rows are computed together, which share the loads of a token. Where 32
     * values take more than 24 bytes, memory is what takes longest, and it is faster with one row
     * after the other. */
    const int64_t few = has_blocks(format) && bytes_of_32(format) <= 24 ? most : 1;
    int64_t panel = task->indptr ? 1 : task->n_tokens >= TOKEN_BLOCK ? ROW_PANEL : few;
    for (int64_t i = begin; i < end; i += panel) {
        int64_t rows = end - i < panel ? end - i : panel;
        int64_t count = task->indptr ? task->indptr[i + 1] - task->indptr[i] : task->n_tokens;
        for (int r = 0; r < rows; r++) {
            int64_t now = i + r, later = now + ahead < end ? now + ahead : end - 1;
            row[r] = task->memory + (task->rows ? task->rows[now] : now * task->row_bytes);
            coming[r] = task->memory + (task->rows ? task->rows[later] : later * task->row_bytes);
        }
#define UP(rows, count) NAME(up_block)(task, format, rows, count, row + r, coming + r, i + r, k)
        for (int64_t k = 0; k < count; k += count - k >= TOKEN_BLOCK ? TOKEN_BLOCK : 1)
            for (int64_t r = 0; r < rows; r += rows - r >= most ? most : 1) {
                /* So many tokens of all rows of blocks go through tiles. */
                if (!has_blocks(format) && count - k >= TOKEN_BLOCK && rows - r >= most)
                    UP(most, TOKEN_BLOCK);
                else if (count - k >= TOKEN_BLOCK) UP(1, TOKEN_BLOCK);
                else if (rows - r >= most) UP(most, 1);
                else UP(1, 1);
            }
#undef UP
    }
}

#define CASE(code, ...) \
    case code: NAME(up_format)(task, code, begin, end); break;

#ifndef UNIT_FLOATS /* Its products with blocks are those of another unit. */

static void NAME(up_blocks)(const up_task *task, int64_t begin, int64_t end) {
#if defined(UNIT_PLAIN) /* where one loop does for the others */
    switch (task->format) {
        CASE(Q8_0)
        CASE(Q4_0)
    default: NAME(up_format)(task, task->format, begin, end);
    }
#else
    switch (task->format) { BLOCK_FORMATS(CASE) }
#endif
}

#endif
#ifndef UNIT_EXTENDS /* Only the products with blocks differ from those of the unit it extends. */

static void NAME(up)(const up_task *task, int64_t begin, int64_t end) {
    switch (task->format) { FLOAT_FORMATS(CASE) }
}

#undef CASE

/* y[begin:end] += a[i] * row_i[begin:end] for one token, rows in order, some at a time. */
INLINE void NAME(down_one)(const down_task *task, int format, int64_t begin, int64_t end) {
    const uint8_t *row[DOWN_TOGETHER], *coming[DOWN_TOGETHER];
    float a[DOWN_TOGETHER];
    const int64_t size = bytes_of_32(format);
    int64_t ahead = DOWN_AHEAD_BYTES / (bytes_before(format, end - begin) + 1);
    for (int64_t i = 0; i < task->n_rows;) {
        int rows = 0;
        for (; rows < DOWN_TOGETHER && i < task->n_rows; i++) {
            if (task->a[i] == 0) continue;
            a[rows] = task->a[i];
            row[rows++] = task->memory + task->rows[i];
        }
        for (int r = 0; r < DOWN_TOGETHER; r++) {
            int64_t later = i + ahead + r;
            coming[r] = task->memory + task->rows[later < task->n_rows ? later : task->n_rows - 1];
        }
        for (int64_t j = begin; j < end; j += 32) {
            int64_t n = end - j < 32 ? end - j : 32;
            const int64_t at = bytes_before(format, j);
            if (at % 64 < size) /* once a cache line */
                for (int r = 0; r < DOWN_TOGETHER; r++) __builtin_prefetch(coming[r] + at, 0, 2);
            float padded[32] = {0};
            float *y = n == 32 ? task->y + j : padded;
            if (n < 32) memcpy(padded, task->y + j, 4 * n);
            V sum = NAME(load_f32)(y);
            if (rows == DOWN_TOGETHER && n == 32)
                for (int r = 0; r < DOWN_TOGETHER; r++)
                    sum = NAME(fma)(NAME(set)(a[r]), NAME(load)(format, row[r], j), sum);
            else
                for (int r = 0; r < rows; r++) {
                    V w = n == 32 ? NAME(load)(format, row[r], j) : NAME(load_tail)(format, row[r], j, n);
                    sum = NAME(fma)(NAME(set)(a[r]), w, sum);
                }
            NAME(store)(y, sum);
            if (n < 32) memcpy(task->y + j, padded, 4 * n);
        }
    }
}

/* The factors of the rows from i on, at most DOWN_ROWS, by token; returns how many rows. */
static int64_t NAME(down_factors)(const down_task *task, int64_t i, down_panel *panel) {
    int64_t rows = task->n_rows - i < DOWN_ROWS ? task->n_rows - i : DOWN_ROWS, n = task->n_tokens;
    if (task->indptr) {
        for (int64_t t = 0; t < n; t++) panel[t].used = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = task->indptr[i + r]; k < task->indptr[i + r + 1]; k++) {
                down_panel *token = panel + task->tokens[k];
                token->a[r] = task->a[k];
                token->used |= (uint64_t)(token->a[r] != 0) << r;
            }
        return rows;
    }
    for (int64_t t = 0; t < n; t += 16) { /* a few tokens at a time stay in the nearest cache */
        int64_t count = n - t < 16 ? n - t : 16;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < count; k++) panel[t + k].a[r] = task->a[(i + r) * n + t + k];
        for (int64_t k = 0; k < count; k++) {
            const float *a = panel[t + k].a;
            int zeros = 0;
            for (int64_t r = 0; r < rows; r++) zeros += a[r] == 0;
            panel[t + k].used = ALL_OF(rows);
            if (zeros)
                for (int64_t r = 0; r < rows; r++)
                    panel[t + k].used ^= (uint64_t)(a[r] == 0) << r;
        }
    }
    return rows;
}

/* y[0:DOWN_COLUMNS] += the rows that a token uses, which are decoded in w. */
INLINE void NAME(down_token)(const down_panel *token, const float w[][DOWN_ROWS][32], float *y) {
    V sums[DOWN_COLUMNS / 32];
    for (int c = 0; c < DOWN_COLUMNS / 32; c++) sums[c] = NAME(load_f32)(y + 32 * c);
    for (uint64_t left = token->used; left; left &= left - 1) {
        int r = __builtin_ctzll(left);
        V a = NAME(set)(token->a[r]);
        for (int c = 0; c < DOWN_COLUMNS / 32; c++)
            sums[c] = NAME(fma)(a, NAME(load_f32)(w[c][r]), sums[c]);
    }
    for (int c = 0; c < DOWN_COLUMNS / 32; c++) NAME(store)(y + 32 * c, sums[c]);
}

/* The same for DOWN_TOKENS tokens that use all of the rows, and as many of the columns at a time as
 * the registers allow; y is of the first token, and d floats apart. */
INLINE void NAME(down_tile)(const down_panel *tokens, int64_t rows, const float w[][DOWN_ROWS][32],
                            int64_t columns, float *y, int64_t d) {
    enum { GROUPS = DOWN_TILE_COLUMNS / LANES };
    for (int c = 0; c < columns; c += DOWN_TILE_COLUMNS) {
        NAME(lane_group) sum[DOWN_TOKENS][GROUPS], row[GROUPS];
        for (int k = 0; k < DOWN_TOKENS; k++)
            for (int g = 0; g < GROUPS; g++)
                sum[k][g] = NAME(load_lanes)(y + k * d + c + g * LANES);
        for (int64_t r = 0; r < rows; r++) {
            for (int g = 0; g < GROUPS; g++) {
                int at = c + g * LANES;
                row[g] = NAME(load_lanes)(&w[at / 32][r][at % 32]);
            }
            for (int k = 0; k < DOWN_TOKENS; k++) {
                NAME(lane_group) a = NAME(set_lanes)(tokens[k].a[r]);
                for (int g = 0; g < GROUPS; g++) sum[k][g] = NAME(fma_lanes)(a, row[g], sum[k][g]);
            }
        }
        for (int k = 0; k < DOWN_TOKENS; k++)
            for (int g = 0; g < GROUPS; g++)
                NAME(store_lanes)(y + k * d + c + g * LANES, sum[k][g]);
    }
}

/* Whether DOWN_TOKENS tokens from the t-th on use all rows of a panel. */
INLINE int NAME(use_all)(const down_task *task, const down_panel *panel, int64_t t, int64_t rows) {
    if (t + DOWN_TOKENS > task->n_tokens) return 0;
    for (int k = 0; k < DOWN_TOKENS; k++)
        if (panel[t + k].used != ALL_OF(rows)) return 0;
    return 1;
}

/* Columns c..c + width of the rows from i on, decoded; those of the next rows are fetched into
 * the cache. */
INLINE void NAME(decode_down)(const down_task *task, int format, int64_t i, int64_t rows, int64_t c,
                              int64_t width, float w[][DOWN_ROWS][32]) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = task->memory + task->rows[i + r];
        int64_t later = i + r + rows < task->n_rows ? i + r + rows : i + r;
        const uint8_t *coming = task->memory + task->rows[later];
        if (!NAME(has_loader)(format)) {
            __builtin_prefetch(coming + bytes_before(format, c), 0, 2);
            NAME(decode_blocks)(format, row, c / 32, width / 32, w[0][r], DOWN_ROWS * 32);
            continue;
        }
        for (int64_t j = 0; j < DOWN_COLUMNS; j += 32) {
            if (j < width) __builtin_prefetch(coming + bytes_before(format, c + j), 0, 2);
            NAME(store)(w[j / 32][r], width - j >= 32  ? NAME(load)(format, row, c + j)
                                      : width - j > 0 ? NAME(load_tail)(format, row, c + j, width - j)
                                                      : NAME(set)(0));
        }
    }
}

/* The same for many tokens: a panel of rows is decoded, some columns of it at a time, and each
 * token adds those that it uses. `panel` has room for every token. */
INLINE void NAME(down_many)(const down_task *task, int format, int64_t begin, int64_t end,
                            down_panel *panel) {
    float w[DOWN_COLUMNS / 32][DOWN_ROWS][32] __attribute__((aligned(64))), padded[DOWN_COLUMNS];
    for (int64_t i = 0; i < task->n_rows; i += DOWN_ROWS) {
        int64_t rows = NAME(down_factors)(task, i, panel);
        for (int64_t c = begin; c < end; c += DOWN_COLUMNS) {
            int64_t width = end - c < DOWN_COLUMNS ? end - c : DOWN_COLUMNS;
            NAME(decode_down)(task, format, i, rows, c, width, w);
            for (int64_t t = 0; t < task->n_tokens; t++) {
                float *y = task->y + t * task->d + c;
                if (!panel[t].used) continue;
                if (width < DOWN_COLUMNS) {
                    memcpy(padded, y, 4 * width);
                    NAME(down_token)(panel + t, w, padded);
                    memcpy(y, padded, 4 * width);
                } else if (NAME(use_all)(task, panel, t, rows)) {
                    NAME(down_tile)(panel + t, rows, w, DOWN_COLUMNS, y, task->d);
                    t += DOWN_TOKENS - 1;
                } else {
                    NAME(down_token)(panel + t, w, y);
                }
            }
        }
    }
}

static void NAME(down)(const down_task *task, int64_t begin, int64_t end, down_panel *panel) {
    int one = task->n_tokens == 1 && !task->indptr;
    switch (task->format) {
#define CASE(code, ...) \
    case code: \
        if (one) NAME(down_one)(task, code, begin, end); \
        else NAME(down_many)(task, code, begin, end, panel); \
        break;
        FLOAT_FORMATS(CASE)
        CASE(Q8_0)
        CASE(Q4_0)
#undef CASE
    default: /* one loop for the others, whose neurons are seldom apart in a file */
        if (NAME(has_loader)(task->format)) __builtin_unreachable();
        NAME(down_many)(task, task->format, begin, end, panel);
    }
}

/* x[begin:end] through an activation, in place. */
static void NAME(activate)(float *x, int64_t begin, int64_t end, int kind, float threshold) {
    switch (kind) {
#define CASE(code, name, activated) \
    case code: \
        for (int64_t i = begin; i < end; i++) { \
            float v = x[i]; \
            x[i] = activated; \
        } \
        break;
        ACTIVATIONS(CASE)
#undef CASE
    }
}

/* scores (n,), of q . keys, become e^(score - largest); returns their sum. There is room for n
 * rounded up to 32. */
INLINE float NAME(exponentials)(const attention_task *task, const float *bias, const float *sink,
                                int64_t n, float *scores) {
    float largest = sink ? *sink : -INFINITY;
    if (task->cap)
        for (int64_t p = 0; p < n; p++) scores[p] = cap_f32(scores[p], task->cap);
    for (int64_t p = 0; p < n; p++) {
        scores[p] += bias ? bias[p] : 0.0f;
        if (scores[p] > largest) largest = scores[p];
    }
    for (int64_t p = 0; p < n; p++) scores[p] = exp_f32(scores[p] - largest);
    for (int64_t p = n; p % 32; p++) scores[p] = 0.0f;
    V lanes = NAME(set)(0), one = NAME(set)(1);
    for (int64_t p = 0; p < n; p += 32) lanes = NAME(fma)(NAME(load_f32)(scores + p), one, lanes);
    return NAME(sum)(lanes) + (sink ? exp_f32(*sink - largest) : 0.0f);
}

/* One head of one token over n positions: softmax(q . keys + bias) values. The head's width is
 * padded to whole blocks of 32; `scores` has room for n rounded up to 32. */
INLINE void NAME(attend_format)(const attention_task *task, int format, const float *q,
                                const uint8_t *keys, const uint8_t *values, const float *bias,
                                const float *sink, int64_t n, float *scores, float *out) {
    int64_t width = task->width, row_bytes = bytes_of_row(format, width);
    const int64_t only[1] = {0};
    float score[MOST_ROWS][TOKEN_BLOCK];
    for (int64_t p = 0; p < n; p++) {
        const uint8_t *key[1] = {keys + p * row_bytes}, *coming[1] = {key[0] + 8 * row_bytes};
        NAME(dots)(format, 1, 1, key, coming, q, only, width, score);
        scores[p] = score[0][0];
    }
    float total = NAME(exponentials)(task, bias, sink, n, scores);
    for (int64_t j = 0; j < width; j += 32) {
        V sum = NAME(set)(0);
        for (int64_t p = 0; p < n; p++)
            sum = NAME(fma)(NAME(set)(scores[p]), NAME(load)(format, values + p * row_bytes, j), sum);
        NAME(store)(out + j, sum);
    }
    for (int64_t j = 0; j < width; j++) out[j] = out[j] / total;
}

static void NAME(attend)(const attention_task *task, int64_t begin, int64_t end, float *scores) {
    int64_t row_bytes = bytes_of_row(task->format, task->width);
    for (int64_t item = begin; item < end; item++) {
        int64_t token = item / task->n_heads, head = item % task->n_heads;
        int64_t n = end_seen(task, token);
        int64_t first = task->window && n > task->window ? n - task->window : 0;
        int64_t group = head / (task->n_heads / task->n_groups);
        int64_t offset = (group * task->context + first) * row_bytes;
        const uint8_t *keys = task->keys + offset, *values = task->values + offset;
        const float *bias = task->bias ? task->bias + head * task->context + first : NULL;
        const float *sink = task->sinks ? task->sinks + head : NULL;
        const float *q = task->q + item * task->width;
        float *out = task->out + item * task->width;
#define ATTEND(format) \
    NAME(attend_format)(task, format, q, keys, values, bias, sink, n - first, scores, out)
        if (task->format == F32) ATTEND(F32);
        else if (task->format == F16) ATTEND(F16);
        else ATTEND(Q8_0);
#undef ATTEND
    }
}

/* 32 columns of a state's row, or the last n < 32 of them. */
INLINE V NAME(load_columns)(const float *p, int64_t n) {
    return n >= 32 ? NAME(load_f32)(p) : NAME(load_tail)(F32, (const uint8_t *)p, 0, n);
}

INLINE void NAME(store_columns)(float *p, V v, int64_t n) {
    float padded[32];
    if (n >= 32) {
        NAME(store)(p, v);
        return;
    }
    NAME(store)(padded, v);
    memcpy(p, padded, n * sizeof(float));
}

/* Items begin..end, each 32 columns of a head's state, which no other columns have a part in; one
 * token after the other, and the rows of the state in their order. */
static void NAME(linear_attention)(const linear_attention_task *task, int64_t begin, int64_t end) {
    const V zero = NAME(set)(0), minus = NAME(set)(-1);
    const int64_t steps = steps_of(task->width), n = task->n, width = task->width;
    for (int64_t item = begin; item < end; item++) {
        int64_t head = item / steps, column = item % steps * 32, columns = width - column;
        int64_t group = head / (task->n_heads / task->n_groups);
        float *state = task->state + head * n * width + column;
        for (int64_t t = 0; t < task->n_tokens; t++) {
            int64_t of_head = t * task->n_heads + head, at = of_head * width + column;
            const float *q = task->q + (t * task->n_groups + group) * n;
            const float *k = task->k + (t * task->n_groups + group) * n;
            V decay = NAME(set)(task->decay[of_head]), seen = zero, read = zero;
            V u = NAME(load_columns)(task->v + at, columns);
            if (task->delta) {
                for (int64_t i = 0; i < n; i++) {
                    V s = NAME(fma)(NAME(load_columns)(state + i * width, columns), decay, zero);
                    seen = NAME(fma)(NAME(set)(k[i]), s, seen);
                }
                u = NAME(fma)(seen, minus, u);
            }
            u = NAME(fma)(u, NAME(set)(task->rate[of_head]), zero);
            for (int64_t i = 0; i < n; i++) {
                V s = NAME(fma)(NAME(load_columns)(state + i * width, columns), decay, zero);
                s = NAME(fma)(NAME(set)(k[i]), u, s);
                NAME(store_columns)(state + i * width, s, columns);
                read = NAME(fma)(NAME(set)(q[i]), s, read);
            }
            NAME(store_columns)(task->y + at, read, columns);
        }
    }
}

#endif

#undef CASE
