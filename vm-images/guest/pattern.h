/* What every page of the checked area must hold: a function of its index, its generation and the
 * word within it, nothing else, so a page can be verified without knowing where it came from.
 *
 * A page starts from a mixed seed and steps by an odd constant: any two words of one page differ,
 * a page of another index or generation differs in (practically) every word, a page shifted by
 * whole words does not fit, and neither does a page of zeros.  A given share of the pages is zero
 * instead, chosen anew for each generation, so that zero pages are tested like the others.
 */
#ifndef QPC_PATTERN_H
#define QPC_PATTERN_H

#include <stdbool.h>
#include <stdint.h>

enum {
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
};

#define WORD_STEP 0x9e3779b97f4a7c15ull /* odd, so a multiple of it below 2^64 never repeats */

/* The finaliser of splitmix64: every input bit changes about half of the output bits. */
static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static inline uint64_t page_seed(uint64_t page_index, uint64_t generation)
{
	return mix(mix(page_index + 1) + generation * 0xd6e8feb86659fd93ull);
}

static inline bool page_is_zero(uint64_t seed, unsigned int zero_percent)
{
	return mix(seed ^ 0x5a5a5a5a5a5a5a5aull) % 100 < zero_percent;
}

static inline uint64_t expected_word(uint64_t seed, bool zero, unsigned int word_index)
{
	return zero ? 0 : seed + word_index * WORD_STEP;
}

/* Words are stored one by one and never vectorised: TCG emulates SSE by helper calls, which is
 * several times slower than plain 64-bit stores. */
static inline void write_page(uint64_t *page, uint64_t seed, bool zero)
{
	uint64_t value = zero ? 0 : seed;
	uint64_t step = zero ? 0 : WORD_STEP;
	volatile uint64_t *word = page;

	for (unsigned int i = 0; i < PAGE_WORDS; i += 8) {
		word[i] = value;
		word[i + 1] = value + step;
		word[i + 2] = value + 2 * step;
		word[i + 3] = value + 3 * step;
		word[i + 4] = value + 4 * step;
		word[i + 5] = value + 5 * step;
		word[i + 6] = value + 6 * step;
		word[i + 7] = value + 7 * step;
		value += 8 * step;
	}
}

/* True if every word is as it must be.  Which words are wrong is found by expected_word(). */
static inline bool page_matches(const uint64_t *page, uint64_t seed, bool zero)
{
	uint64_t value = zero ? 0 : seed;
	uint64_t step = zero ? 0 : WORD_STEP;
	uint64_t difference = 0;
	const volatile uint64_t *word = page;

	for (unsigned int i = 0; i < PAGE_WORDS; i += 8) {
		difference |= word[i] ^ value;
		difference |= word[i + 1] ^ (value + step);
		difference |= word[i + 2] ^ (value + 2 * step);
		difference |= word[i + 3] ^ (value + 3 * step);
		difference |= word[i + 4] ^ (value + 4 * step);
		difference |= word[i + 5] ^ (value + 5 * step);
		difference |= word[i + 6] ^ (value + 6 * step);
		difference |= word[i + 7] ^ (value + 7 * step);
		value += 8 * step;
	}
	return difference == 0;
}

#endif
