/* Attention of many tokens, tile by tile. Included once a unit by kernels.h.
 *
 * DOWN_TOKENS tokens' queries of one head meet the keys together, as rows meet tokens in tiles.h,
 * and then the values, as in the down projection. Each query adds what it adds in attend_format,
 * in the same order: the same bits.
 */

#ifndef UNIT_EXTENDS

/* What a tile of queries needs: one head of `count` tokens from the t-th on. */
typedef struct {
    float *sums, *keys, *queries; /* see panel */
    float *scores;                /* (DOWN_TOKENS, room) */
    int64_t room;
} NAME(attention_scratch);

/* The first position that token t of a task sees. */
INLINE int64_t NAME(first_seen)(const attention_task *task, int64_t t) {
    int64_t n = end_seen(task, t);
    return task->window && n > task->window ? n - task->window : 0;
}

/* scores[k][p - low] = query k . key p, for the positions low <= p < high. */
INLINE void NAME(score_tile)(const attention_task *task, int format, int64_t t, int64_t head,
                             int64_t count, int64_t low, int64_t high,
                             const NAME(attention_scratch) *s) {
    const int64_t width = task->width, row_bytes = bytes_of_row(format, width);
    const int64_t group = head / (task->n_heads / task->n_groups);
    float *queries = s->scores; /* until there are scores */
    for (int64_t k = 0; k < count; k++)
        memcpy(queries + k * width, task->q + ((t + k) * task->n_heads + head) * width, 4 * width);
    up_task keys = {.memory = task->keys + (group * task->context + low) * row_bytes,
                    .row_bytes = row_bytes, .n_rows = high - low, .d = width, .n_tokens = count,
                    .format = format, .x = queries, .out = s->scores, .out_row = 1,
                    .out_token = s->room};
    for (int64_t k = 0; k < count; k += TILE_TOKENS)
        NAME(lay_out_floats)(&keys, k, count - k < TILE_TOKENS ? count - k : TILE_TOKENS,
                             s->queries + k * width);
    for (int64_t i = 0; i < high - low; i += PANEL_ROWS) {
        int64_t rows = high - low - i < PANEL_ROWS ? high - low - i : PANEL_ROWS;
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            NAME(decode_tile)(&keys, format, i + r, high - low, s->keys + r * width);
        for (int64_t k = 0; k < count; k += TILE_TOKENS) {
            int64_t n = count - k < TILE_TOKENS ? count - k : TILE_TOKENS;
            NAME(panel)(s->keys, s->queries + k * width, rows, n, width, s->sums);
            NAME(fold_tile)(&keys, s->sums, 32, NULL, i, rows, k, n);
        }
    }
}

/* out[j:j + 32] += a[p] * values[p][j:j + 32] for the positions begin <= p < end, ascending. */
INLINE void NAME(add_values)(int format, const float *a, const uint8_t *values, int64_t row_bytes,
                             int64_t j, int64_t begin, int64_t end, float *out) {
    V sum = NAME(load_f32)(out);
    for (int64_t p = begin; p < end; p++)
        sum = NAME(fma)(NAME(set)(a[p]), NAME(load)(format, values + p * row_bytes, j), sum);
    NAME(store)(out, sum);
}

/* The same for DOWN_TOKENS queries and DOWN_COLUMNS columns from c on, whose sums are in y; what
 * scores there are of position p lies at scores[k][p]. */
INLINE void NAME(value_tile)(const attention_task *task, int format, const uint8_t *values,
                             const float *scores, int64_t room, int64_t c, int64_t begin,
                             int64_t end, float *y) {
    const int64_t row_bytes = bytes_of_row(format, task->width);
    float w[DOWN_COLUMNS / 32][DOWN_ROWS][32] __attribute__((aligned(64)));
    down_panel factors[DOWN_TOKENS];
    for (int64_t p = begin; p < end; p += DOWN_ROWS) {
        int64_t rows = end - p < DOWN_ROWS ? end - p : DOWN_ROWS;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < DOWN_COLUMNS; j += 32)
                NAME(store)(w[j / 32][r], c + j < task->width
                                              ? NAME(load)(format, values + (p + r) * row_bytes, c + j)
                                              : NAME(set)(0));
        for (int k = 0; k < DOWN_TOKENS; k++)
            memcpy(factors[k].a, scores + k * room + p, rows * sizeof(float));
        int64_t columns = task->width - c < DOWN_COLUMNS ? task->width - c : DOWN_COLUMNS;
        NAME(down_tile)(factors, rows, w, columns, y, DOWN_COLUMNS);
    }
}

/* One head of tokens t..t + count, at most DOWN_TOKENS, as attend_format. The positions that all
 * of them see are taken together; those before and behind, by each that sees them. */
INLINE void NAME(attend_tile)(const attention_task *task, int format, int64_t t, int64_t head,
                              int64_t count, const NAME(attention_scratch) *s) {
    const int64_t width = task->width, row_bytes = bytes_of_row(format, width), room = s->room;
    const int64_t low = NAME(first_seen)(task, t), high = end_seen(task, t + count - 1);
    const int64_t group = head / (task->n_heads / task->n_groups);
    const uint8_t *values = task->values + (group * task->context + low) * row_bytes;
    int64_t first[DOWN_TOKENS], end[DOWN_TOKENS]; /* of each, relative to low */
    float total[DOWN_TOKENS];
    NAME(score_tile)(task, format, t, head, count, low, high, s);
    for (int64_t k = 0; k < count; k++) {
        first[k] = NAME(first_seen)(task, t + k) - low, end[k] = end_seen(task, t + k) - low;
        const float *bias = task->bias ? task->bias + head * task->context + low + first[k] : NULL;
        total[k] = NAME(exponentials)(task, bias, task->sinks ? task->sinks + head : NULL,
                                      end[k] - first[k], s->scores + k * room + first[k]);
    }
    int64_t begin = first[count - 1], stop = end[0] > begin ? end[0] : begin;
    for (int64_t c = 0; c < width; c += DOWN_COLUMNS) {
        float y[DOWN_TOKENS][DOWN_COLUMNS] = {{0}};
        int64_t columns = width - c < DOWN_COLUMNS ? width - c : DOWN_COLUMNS;
        for (int64_t k = 0; k < count; k++)
            for (int64_t j = 0; j < columns; j += 32)
                NAME(add_values)(format, s->scores + k * room, values, row_bytes, c + j, first[k],
                                 end[k] < begin ? end[k] : begin, y[k] + j);
        NAME(value_tile)(task, format, values, s->scores, room, c, begin, stop, y[0]);
        for (int64_t k = 0; k < count; k++) {
            float *out = task->out + ((t + k) * task->n_heads + head) * width + c;
            for (int64_t j = 0; j < columns; j += 32)
                NAME(add_values)(format, s->scores + k * room, values, row_bytes, c + j,
                                 stop, end[k], y[k] + j);
            for (int64_t j = 0; j < columns; j++) out[j] = y[k][j] / total[k];
        }
    }
}

/* The items begin..end, each a head of DOWN_TOKENS tokens; all of a head's follow each other. */
static void NAME(attend_tiles)(const attention_task *task, int64_t begin, int64_t end,
                               float *scratch, int64_t room) {
    const int64_t tiles = (task->n_tokens + DOWN_TOKENS - 1) / DOWN_TOKENS, width = task->width;
    NAME(attention_scratch) s = {.sums = scratch, .room = room};
    s.keys = s.sums + PANEL_ROWS * MOST_TILE_TOKENS * 32;
    s.queries = s.keys + PANEL_ROWS * width;
    s.scores = s.queries + DOWN_TOKENS * width;
    for (int64_t item = begin; item < end; item++) {
        int64_t head = item / tiles, t = item % tiles * DOWN_TOKENS;
        int64_t count = task->n_tokens - t < DOWN_TOKENS ? task->n_tokens - t : DOWN_TOKENS;
        if (task->format == F32) NAME(attend_tile)(task, F32, t, head, count, &s);
        else if (task->format == F16) NAME(attend_tile)(task, F16, t, head, count, &s);
        else NAME(attend_tile)(task, Q8_0, t, head, count, &s);
    }
}

#endif

#undef V
#undef EACH
#undef ROW_BLOCK
#undef ROW_BLOCK_8BIT
#undef LANES
#undef DOWN_TILE_COLUMNS
#undef TILE_ROWS
#undef TILE_TOKENS
#undef GROUP_8BIT
#undef HALVES_8BIT
#undef TILE_ROWS_8BIT
#undef TILE_TOKENS_8BIT
