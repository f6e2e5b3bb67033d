/* A trace of one value, the logits of three tokens, written without any library. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    enum { TOKENS = 3, VOCABULARY = 4 };
    float logits[TOKENS][VOCABULARY] = {{0.5f, -1, 2, 0}, {1, 2, 3, 4}, {0, 0, 1, 0}};
    const char *header =
        "{\"__metadata__\":{\"flashinfer.trace\":\"1\",\"flashinfer.tokens\":\"[2,0,1]\","
        "\"flashinfer.engine\":\"an engine in C\"},"
        "\"logits\":{\"dtype\":\"F32\",\"shape\":[3,4],\"data_offsets\":[0,48]}}";
    uint64_t length = strlen(header);
    FILE *file = argc == 2 ? fopen(argv[1], "wb") : NULL;
    if (!file) return fprintf(stderr, "usage: write_trace FILE\n"), 2;
    fwrite(&length, sizeof length, 1, file); /* little-endian */
    fwrite(header, 1, length, file);
    fwrite(logits, 1, sizeof logits, file);
    return fclose(file) ? 1 : 0;
}
