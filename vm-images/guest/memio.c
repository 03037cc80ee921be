/* Disk I/O straight from and into memory that nobody else touches first.
 *
 * Fills qpc.fill MiB (default 4) with generation 0, then reads the first page of the disk (/dev/vda)
 * every qpc.tick_ms until it says "go": whoever restores the guest gives it a disk that does.  Then,
 * by O_DIRECT, so that the device's access to each page is the first one since the fill:
 *
 *   first half of the pages       written to the disk, 64 KiB at a time, from OUT_OFFSET on
 *   third quarter                 read from the disk, from IN_OFFSET on (holds DISK_GENERATION)
 *   last quarter                  the first half of each page is read from there, the rest stays
 *
 * Last, every page is verified; the first half of them must be as it was.  A pass is then reported. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "options.h"
#include "pattern.h"
#include "report.h"

enum {
	IN_OFFSET = 1 << 20,
	OUT_OFFSET = 64 << 20,
	DISK_GENERATION = 7,
	PIECE_PAGES = 16,
};

static int disk;

static uint64_t *map_pages(uint64_t pages)
{
	size_t bytes = (size_t)pages * PAGE_BYTES;
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		report_failure("cannot map %llu pages: %s", (unsigned long long)pages,
			       strerror(errno));
	madvise(at, bytes, MADV_NOHUGEPAGE);
	return at;
}

static void transfer(bool out, void *buffer, size_t bytes, off_t offset)
{
	ssize_t done = out ? pwrite(disk, buffer, bytes, offset) :
			     pread(disk, buffer, bytes, offset);

	if (done != (ssize_t)bytes)
		report_failure("disk %s at %lld: %zd of %zu bytes: %s", out ? "write" : "read",
			       (long long)offset, done, bytes, strerror(errno));
}

static void check_words(const uint64_t *page, uint64_t index, unsigned int generation,
			unsigned int first, unsigned int end)
{
	uint64_t seed = page_seed(index, generation);

	for (unsigned int i = first; i < end; i++)
		if (page[i] != expected_word(seed, false, i))
			report_failure("page %llu word %u: want %016llx of generation %u, got %016llx",
				       (unsigned long long)index, i,
				       (unsigned long long)expected_word(seed, false, i), generation,
				       (unsigned long long)page[i]);
}

int main(void)
{
	unsigned int tick_ms = (unsigned int)option_number("tick_ms", 50, 1, 60000);
	uint64_t mib = option_number("fill", 4, 1, 48), pages = mib * 256;
	uint64_t *area = map_pages(pages), *command = map_pages(1);

	disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
	if (disk < 0)
		report_failure("cannot open /dev/vda: %s", strerror(errno));
	for (uint64_t i = 0; i < pages; i++)
		write_page(area + i * PAGE_WORDS, page_seed(i, 0), false);
	report_ready(mib, pages, 0);
	report_start_ticker(tick_ms);
	do {
		sleep_until_ns(now_ns() + tick_ms * 1000000ull);
		transfer(false, command, PAGE_BYTES, 0);
	} while (memcmp(command, "go", 2));

	uint64_t half = pages / 2, three_quarters = half + pages / 4;
	for (uint64_t i = 0; i < half; i += PIECE_PAGES)
		transfer(true, area + i * PAGE_WORDS, PIECE_PAGES * PAGE_BYTES,
			 OUT_OFFSET + (off_t)i * PAGE_BYTES);
	for (uint64_t i = half; i < three_quarters; i += PIECE_PAGES)
		transfer(false, area + i * PAGE_WORDS, PIECE_PAGES * PAGE_BYTES,
			 IN_OFFSET + (off_t)i * PAGE_BYTES);
	for (uint64_t i = three_quarters; i < pages; i++)
		transfer(false, area + i * PAGE_WORDS, PAGE_BYTES / 2,
			 IN_OFFSET + (off_t)i * PAGE_BYTES);

	for (uint64_t i = 0; i < pages; i++) {
		unsigned int read_words = i < half ? 0 :
					  i < three_quarters ? PAGE_WORDS : PAGE_WORDS / 2;
		check_words(area + i * PAGE_WORDS, i, DISK_GENERATION, 0, read_words);
		check_words(area + i * PAGE_WORDS, i, 0, read_words, PAGE_WORDS);
		atomic_fetch_add(&progress.pages, 1);
	}
	if (fsync(disk))
		report_failure("fsync: %s", strerror(errno));
	progress.passes++;
	report_progress();
	for (;;)
		pause();
}
