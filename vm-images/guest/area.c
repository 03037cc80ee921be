#define _GNU_SOURCE
#include "area.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "pattern.h"
#include "report.h"

static uint64_t *page_at(const struct area *area, uint64_t page_index)
{
	return area->words + page_index * PAGE_WORDS;
}

struct area area_create(uint64_t mib, unsigned int zero_percent)
{
	struct area area = { .pages = mib * 256, .zero_percent = zero_percent };
	size_t bytes = (size_t)area.pages * PAGE_BYTES;
	uint64_t zero_pages = 0;

	/* MAP_NORESERVE: the fill below finds out whether the memory is there, page by page */
	area.words = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area.words == MAP_FAILED)
		report_failure("cannot map %llu MiB: %s", (unsigned long long)mib, strerror(errno));
	/* Small pages: each page of the area is then a page of the guest's RAM of its own, at an
	 * address that has nothing to do with its index. */
	madvise(area.words, bytes, MADV_NOHUGEPAGE);
	for (uint64_t i = 0; i < area.pages; i++) {
		uint64_t seed = page_seed(i, 0);
		bool zero = page_is_zero(seed, zero_percent);
		/* A zero page is written too: only then does RAM stand behind it. */
		write_page(page_at(&area, i), seed, zero);
		zero_pages += zero;
	}
	report_ready(mib, area.pages, zero_pages);
	return area;
}

void area_visit(const struct area *area, uint64_t page_index, uint64_t generation, bool rewrite)
{
	uint64_t *page = page_at(area, page_index);
	uint64_t seed = page_seed(page_index, generation);
	bool zero = page_is_zero(seed, area->zero_percent);

	if (!page_matches(page, seed, zero))
		report_bad_page(page_index, generation, seed, zero, page);
	if (rewrite) {
		seed = page_seed(page_index, generation + 1);
		write_page(page, seed, page_is_zero(seed, area->zero_percent));
	}
	atomic_fetch_add_explicit(&progress.pages, 1, memory_order_relaxed);
}
