/* The checked area: anonymous memory filled with the pattern, and the check of one page of it. */
#ifndef QPC_AREA_H
#define QPC_AREA_H

#include <stdbool.h>
#include <stdint.h>

struct area {
	uint64_t *words;
	uint64_t pages;
	unsigned int zero_percent;
};

/* Maps and fills `mib` MiB with generation 0, then reports ready. */
struct area area_create(uint64_t mib, unsigned int zero_percent);

/* Verifies one page of `generation`; with `rewrite` it then holds the next one. */
void area_visit(const struct area *area, uint64_t page_index, uint64_t generation, bool rewrite);

#endif
