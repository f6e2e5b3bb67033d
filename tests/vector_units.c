/* Runs every kernel on fixed inputs and prints the vector unit in use and a hash of the bits.
 * tests/test_portability.py builds it with each compiler there is and compares the hashes. */
#include <inttypes.h>
#include <stdio.h>

#include "kernels.h"
#include "route.h"

enum { ROWS = 40, TOKENS = 6, HEADS = 3, CONTEXT = 50, WIDTH = 64, START = 20 };

static uint32_t state = 12345;
static uint64_t hash = 1469598103934665603u; /* FNV-1a */

static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (int32_t)next() / 2147483648.0f; }

static void add_to_hash(const void *data, size_t length) {
    for (const uint8_t *byte = data; length--; byte++) hash = (hash ^ *byte) * 1099511628211u;
}

static float *uniforms(int64_t n) {
    float *values = malloc(n * sizeof *values);
    for (int64_t i = 0; i < n; i++) values[i] = uniform();
    return values;
}

/* Random rows of finite numbers: no exponent of all ones, in the values or in the blocks' scales. */
static uint8_t *random_rows(int format, int64_t row_bytes) {
    /* The last bytes of a block's one or two floats. */
    static const int last[N_FORMATS][2] = {
        [F32] = {3, 3}, [F16] = {1, 1}, [BF16] = {1, 1}, [Q8_0] = {1, 1}, [Q4_0] = {1, 1},
        [Q4_1] = {1, 3}, [Q5_0] = {1, 1}, [Q5_1] = {1, 3}, [Q2_K] = {81, 83}, [Q3_K] = {109, 109},
        [Q4_K] = {1, 3}, [Q5_K] = {1, 3}, [Q6_K] = {209, 209}, [IQ4_NL] = {1, 1},
        [IQ4_XS] = {1, 1}, [TQ1_0] = {53, 53}, [TQ2_0] = {65, 65}, [MXFP4] = {0, 0}};
    uint8_t *weights = malloc((size_t)(ROWS * row_bytes));
    for (int64_t i = 0; i < ROWS * row_bytes; i++) weights[i] = next() >> 24;
    for (int64_t i = 0; i < ROWS * row_bytes; i += number_formats[format].bytes)
        for (int k = 0; k < 2; k++) weights[i + last[format][k]] &= 0xBF;
    return weights;
}

static void products(int format, int64_t d) {
    int64_t row_bytes = bytes_of_row(format, d), rows[ROWS];
    uint8_t *weights = random_rows(format, row_bytes);
    for (int64_t i = 0; i < ROWS; i++) rows[i] = i * row_bytes;
    float *x = uniforms(TOKENS * d), *a = malloc(4 * ROWS * TOKENS), *y = calloc(TOKENS * d, 4);
    up_task up = {.memory = weights, .rows = rows, .n_rows = ROWS, .d = d, .n_tokens = TOKENS,
                  .format = format, .x = x, .out = a, .out_row = TOKENS, .out_token = 1};
    if (run_up(&up, ROWS * TOKENS, 2)) exit(1);
    down_task down = {weights, rows, ROWS, d, TOKENS, format, a, NULL, NULL, y};
    run_down(&down, ROWS * TOKENS, 2);
    down.n_tokens = 1;
    run_down(&down, ROWS, 2);
    add_to_hash(a, 4 * ROWS * TOKENS);
    add_to_hash(y, 4 * TOKENS * d);
    free(weights), free(x), free(a), free(y);
}

/* Products with tokens that are rounded to 8 bits, few and in tiles. */
static void rounded_products(int format, int64_t d) {
    enum { MANY = 31 };
    int64_t row_bytes = bytes_of_row(format, d);
    uint8_t *weights = random_rows(format, row_bytes);
    float *x = uniforms(MANY * d), out[ROWS * MANY];
    up_task up = {.memory = weights, .row_bytes = row_bytes, .n_rows = ROWS, .d = d,
                  .format = format, .x = x, .out = out, .out_row = MANY, .out_token = 1};
    for (up.n_tokens = 1; up.n_tokens <= MANY; up.n_tokens += MANY - 1) {
        if (run_rounded_up(&up, ROWS * up.n_tokens, 2)) exit(1);
        for (int i = 0; i < ROWS; i++) add_to_hash(out + i * MANY, 4 * up.n_tokens);
    }
    free(weights), free(x);
}

/* Products of many tokens, which go through tiles, are those of each token by itself. */
static void tiles(int format, int64_t d) {
    enum { MANY = 31 };
    int64_t row_bytes = bytes_of_row(format, d);
    uint8_t *weights = random_rows(format, row_bytes);
    float *x = uniforms(MANY * d), together[ROWS][MANY], alone[ROWS];
    up_task up = {.memory = weights, .row_bytes = row_bytes, .n_rows = ROWS, .d = d,
                  .n_tokens = MANY, .format = format, .x = x, .out = together[0],
                  .out_row = MANY, .out_token = 1};
    if (run_up(&up, ROWS * MANY, 2)) exit(1);
    up.n_tokens = 1, up.out = alone, up.out_row = 1;
    for (int t = 0; t < MANY; t++, up.x += d) {
        if (run_up(&up, ROWS, 1)) exit(1);
        for (int i = 0; i < ROWS; i++)
            if (memcmp(&together[i][t], &alone[i], 4)) exit(2);
    }
    free(weights), free(x);
}

static void norms(void) {
    float *x = uniforms(300), *weight = uniforms(300), *bias = uniforms(300), y[300];
    for (int64_t n = 1; n <= 300; n += 37) {
        layer_norm_row(x, weight, bias, 1e-5f, n, y);
        add_to_hash(y, 4 * n);
    }
    free(x), free(weight), free(bias);
}

static void attention(void) {
    float *q = uniforms(TOKENS * HEADS * WIDTH), *out = uniforms(TOKENS * HEADS * WIDTH);
    float *keys = uniforms(HEADS * CONTEXT * WIDTH), *values = uniforms(HEADS * CONTEXT * WIDTH);
    attention_task task = {
        .q = q, .keys = (uint8_t *)keys, .values = (uint8_t *)values, .n_tokens = TOKENS,
        .n_heads = HEADS, .n_groups = HEADS, .width = WIDTH, .context = CONTEXT, .start = START,
        .format = F32, .out = out};
    if (run_attention(&task, 2)) exit(1);
    add_to_hash(out, 4 * TOKENS * HEADS * WIDTH);
    free(q), free(out), free(keys), free(values);
}

/* States of whole vectors and of others, with the delta rule and without. */
static void linear_attention(void) {
    enum { N = 24, MOST = 70 };
    for (int64_t width = 5; width <= MOST; width += 13)
        for (int delta = 0; delta < 2; delta++) {
            float *q = uniforms(TOKENS * N), *k = uniforms(TOKENS * N), *rate = uniforms(TOKENS * HEADS);
            float *v = uniforms(TOKENS * HEADS * width), *decay = uniforms(TOKENS * HEADS);
            float *state = uniforms(HEADS * N * width), *y = uniforms(TOKENS * HEADS * width);
            linear_attention_task task = {
                .q = q, .k = k, .v = v, .decay = decay, .rate = rate, .state = state,
                .n_tokens = TOKENS, .n_heads = HEADS, .n_groups = 1, .n = N, .width = width,
                .delta = delta, .y = y};
            run_linear_attention(&task, 2);
            add_to_hash(y, 4 * TOKENS * HEADS * width);
            add_to_hash(state, 4 * HEADS * N * width);
            free(q), free(k), free(v), free(decay), free(rate), free(state), free(y);
        }
}

static void route(const routing *r, const float *logits) {
    float values[HEADS * CONTEXT], group_scores[HEADS * CONTEXT], weights[9];
    int32_t kept[HEADS * CONTEXT], chosen[9];
    routing_scratch scratch = {values, group_scores, kept};
    route_token(r, logits, &scratch, chosen, weights);
    add_to_hash(chosen, sizeof chosen);
    add_to_hash(weights, sizeof weights);
}

/* What models other than OPT need: fewer key/value heads, a window, a bias; other activations. */
static void options(void) {
    float *q = uniforms(TOKENS * HEADS * WIDTH), *out = uniforms(TOKENS * HEADS * WIDTH);
    float *keys = uniforms(CONTEXT * WIDTH), *bias = uniforms(HEADS * CONTEXT);
    attention_task task = {
        .q = q, .keys = (uint8_t *)keys, .values = (uint8_t *)keys, .n_tokens = TOKENS,
        .n_heads = HEADS, .n_groups = 1, .width = WIDTH, .context = CONTEXT, .start = START,
        .window = 7, .format = F32, .bias = bias, .cap = 3.0f, .out = out};
    if (run_attention(&task, 2)) exit(1);
    add_to_hash(out, 4 * TOKENS * HEADS * WIDTH);
    for (int kind = RELU; kind <= SIGMOID; kind++) {
        for (int64_t i = 0; i < HEADS * CONTEXT; i++) out[i] = 9 * bias[i];
        run_activate(out, HEADS * CONTEXT, kind, 0.01f, 2);
        add_to_hash(out, 4 * HEADS * CONTEXT);
    }
    rms_norm_row(bias, keys, 1e-5f, HEADS * CONTEXT, out);
    rotate_row(out, keys, keys + 70, 70);
    add_to_hash(out, 4 * HEADS * CONTEXT);
    for (int normalised = 0; normalised < 2; normalised++) {
        routing r = {.experts = HEADS * CONTEXT, .per_token = 9, .groups = 1, .groups_kept = 1,
                     .normalised = normalised, .scale = 1.0f};
        route(&r, bias);
    }
    free(q), free(out), free(keys), free(bias);
}

/* Routers that choose by biased scores, and from the best groups. */
static void routers(void) {
    float *logits = uniforms(HEADS * CONTEXT), *bias = uniforms(HEADS * CONTEXT);
    for (int64_t i = 0; i < HEADS * CONTEXT; i++) logits[i] *= 9;
    for (int options = 0; options < 16; options++) {
        routing r = {.experts = HEADS * CONTEXT, .per_token = 9, .groups = 10, .groups_kept = 3,
                     .normalised = options & 1, .sigmoid = options >> 1 & 1,
                     .by_max = options >> 2 & 1, .choice_bias = options & 8 ? bias : NULL,
                     .scale = 2.5f};
        route(&r, logits);
    }
    free(logits), free(bias);
}

/* Keys and values in 16 bits and in blocks: remembered, and attended to. */
static void small_keys(int format) {
    int64_t row_bytes = bytes_of_row(format, WIDTH), size = CONTEXT * row_bytes;
    float *q = uniforms(TOKENS * HEADS * WIDTH), *out = uniforms(TOKENS * HEADS * WIDTH);
    float *x = uniforms(2 * CONTEXT * WIDTH);
    uint8_t *cache = calloc(2, size);
    remember_rows(x, CONTEXT, 1, WIDTH, cache, CONTEXT, row_bytes, 0, format);
    remember_rows(x + CONTEXT * WIDTH, CONTEXT, 1, WIDTH - 9, cache + size, CONTEXT, row_bytes, 0,
                  format);
    attention_task task = {
        .q = q, .keys = cache, .values = cache + size, .n_tokens = TOKENS, .n_heads = HEADS,
        .n_groups = 1, .width = WIDTH, .context = CONTEXT, .start = START, .window = 9,
        .format = format, .out = out};
    if (run_attention(&task, 2)) exit(1);
    add_to_hash(cache, 2 * size);
    add_to_hash(out, 4 * TOKENS * HEADS * WIDTH);
    free(q), free(out), free(x), free(cache);
}

int main(void) {
    for (int format = F32; format <= BF16; format++)
        for (int64_t d = 37; d <= 200; d += 54) products(format, d);
    for (int format = Q8_0; format <= MXFP4; format++)
        for (int64_t d = 32; d <= 320; d += 96) products(format, d * number_formats[format].block / 32);
    norms();
    attention();
    uint64_t first = hash;
    options();
    uint64_t second = hash;
    routers();
    uint64_t third = hash;
    small_keys(F16);
    small_keys(Q8_0);
    uint64_t fourth = hash;
    linear_attention();
    uint64_t fifth = hash;
    for (int format = TQ1_0; format <= TQ2_0; format++)
        for (int64_t d = 256; d <= 1280; d += 512) products(format, d);
    for (int format = F32; format < N_FORMATS; format++) rounded_products(format, 1280);
    for (int format = F32; format <= BF16; format++)
        for (int64_t d = 37; d <= 200; d += 54) tiles(format, d);
    for (int format = Q8_0; format < N_FORMATS; format++)
        for (int64_t d = 32; d <= 640; d += 96) tiles(format, d * number_formats[format].block / 32);
    printf("%s", best_unit()->name);
    for (int i = 0; i < 6; i++)
        printf(" %016" PRIx64, (uint64_t[]){first, second, third, fourth, fifth, hash}[i]);
    printf("\n");
    return 0;
}
