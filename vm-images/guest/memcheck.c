/* The memory checker: fills qpc.fill MiB (default 64), then verifies every page in turn for ever,
 * rewriting each with the next generation (unless qpc.rewrite=0).  qpc.zero=PERCENT of the pages
 * are zero.  Reports every qpc.tick_ms (default 50) and at the end of every pass.
 *
 * With qpc.memory=MIB it waits first until the guest has that much memory, such as is plugged in;
 * with qpc.litter=MIB it leaves free memory behind that is full of what no page is to hold again, at
 * the end of the pass that qpc.litter_until=PASS (default 1) says. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include "area.h"
#include "options.h"
#include "pattern.h"
#include "report.h"

enum { LITTER_GENERATION = 1 << 30, LOOK_AGAIN_MS = 50 };

static void wait_for_memory(uint64_t mib)
{
	struct sysinfo info;

	while (!sysinfo(&info) && (uint64_t)info.totalram * info.mem_unit < mib << 20)
		sleep_until_ns(now_ns() + LOOK_AGAIN_MS * 1000000ull);
}

static void *make_litter(uint64_t mib)
{
	size_t bytes = (size_t)mib << 20;
	uint64_t *words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (words == MAP_FAILED)
		report_failure("cannot map %llu MiB: %s", (unsigned long long)mib, strerror(errno));
	for (uint64_t i = 0; i < bytes / PAGE_BYTES; i++)
		write_page(words + i * PAGE_WORDS, page_seed(i, LITTER_GENERATION), false);
	return words;
}

int main(void)
{
	bool rewrite = option_number("rewrite", 1, 0, 1);
	unsigned int tick_ms = (unsigned int)option_number("tick_ms", 50, 1, 60000);
	unsigned int zero_percent = (unsigned int)option_number("zero", 0, 0, 100);
	uint64_t litter_until = option_number("litter_until", 1, 1, 1 << 24);
	uint64_t litter_mib = option_number("litter", 0, 0, 1 << 24);
	uint64_t memory_mib = option_number("memory", 0, 0, 1 << 24);

	/* Its reports say then that the guest can be given memory. */
	if (memory_mib)
		report_start_ticker(tick_ms);
	wait_for_memory(memory_mib);
	struct area area = area_create(option_number("fill", 64, 1, 1 << 24), zero_percent);

	void *litter = litter_mib ? make_litter(litter_mib) : NULL;

	if (!memory_mib)
		report_start_ticker(tick_ms);
	for (;;) {
		uint64_t generation = progress.generation;
		for (uint64_t i = 0; i < area.pages; i++)
			area_visit(&area, i, generation, rewrite);
		progress.generation = generation + rewrite;
		progress.passes++;
		report_progress();
		if (litter && progress.passes == litter_until)
			munmap(litter, litter_mib << 20);
	}
}
