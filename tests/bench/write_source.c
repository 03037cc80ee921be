/*
 * Writes the file that page data comes from: word i is mix(i), which is what toucher expects.
 *
 *   write_source FILE WORDS
 */
#define _GNU_SOURCE
#include "handover.h"

int main(int argc, char **argv)
{
    uint64_t words;
    FILE *file;

    if (argc != 3)
        die("usage: write_source FILE WORDS");
    words = strtoull(argv[2], NULL, 0);
    file = fopen(argv[1], "wxe");
    if (!file)
        die(argv[1]);
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = mix(i);

        if (fwrite(&word, sizeof(word), 1, file) != 1)
            die(argv[1]);
    }
    if (fclose(file))
        die(argv[1]);
    return 0;
}
