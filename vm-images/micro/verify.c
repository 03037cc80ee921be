/* A guest without an operating system: fills its memory with a pattern and verifies it for ever.
 *
 * Ring 3 verifies AREA, ring 0 verifies RING0_AREA, every word of both in every pass; after each
 * pass one line goes to the serial port. Nothing is ever repaired: a bad word is counted in each
 * pass. Runs under KVM (also one that emulates ring 0) and TCG.
 */
typedef unsigned long u64;
typedef unsigned short u16;
typedef unsigned char u8;

#define AREA 0x400000UL
#define AREA_WORDS (AREA_BYTES / 8UL)
#define RING0_AREA 0x200000UL
#define RING0_WORDS (RING0_BYTES / 8UL)
#define SERIAL 0x3f8
#define DEBUG_EXIT 0xf4

enum call { CALL_PRINT, CALL_FILL, CALL_VERIFY };

static inline void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 in8(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

/* Never zero, and different for each word. */
static inline u64 pattern(u64 address)
{
	return (address * 0x9e3779b97f4a7c15UL) | 1;
}

static void fill(u64 start, u64 words)
{
	volatile u64 *at = (volatile u64 *)start;
	for (u64 i = 0; i < words; i++)
		at[i] = pattern(start + i * 8);
}

/* The number of words that are not what was written. */
static u64 verify(u64 start, u64 words)
{
	volatile u64 *at = (volatile u64 *)start;
	u64 bad = 0;
	for (u64 i = 0; i < words; i++)
		bad += at[i] != pattern(start + i * 8);
	return bad;
}

static void print_byte(u8 value)
{
	while (!(in8(SERIAL + 5) & 0x20))
		;
	out8(SERIAL, value);
}

/* ---- ring 0 ---- */

u64 ring0_call(u64 number, u64 argument, u64 length)
{
	const char *text = (const char *)argument;

	switch (number) {
	case CALL_PRINT:
		for (u64 i = 0; i < length; i++)
			print_byte((u8)text[i]);
		return 0;
	case CALL_FILL:
		fill(RING0_AREA, RING0_WORDS);
		return 0;
	case CALL_VERIFY:
		return verify(RING0_AREA, RING0_WORDS);
	}
	return ~0UL;
}

static void print_hex(u64 value)
{
	print_byte(' ');
	for (int shift = 60; shift >= 0; shift -= 4)
		print_byte((u8)("0123456789abcdef"[value >> shift & 15]));
}

/* An exception that should not be: CR2 and the two topmost words of the stack, then the end. */
void ring0_trouble(u64 cr2, u64 first, u64 second)
{
	static const char said[] = "micro trouble";

	for (u64 i = 0; i < sizeof(said) - 1; i++)
		print_byte((u8)said[i]);
	print_hex(cr2);
	print_hex(first);
	print_hex(second);
	print_byte('\n');
	out8(DEBUG_EXIT, 1);
}

extern const char on_ud2[], on_trouble[];

static void set_gate(u64 vector, u64 handler)
{
	volatile u64 *gate = (volatile u64 *)(0x2000 + vector * 16);
	gate[0] = (handler & 0xffff) | 0x18UL << 16 | 0x8eUL << 40 | (handler >> 16 & 0xffff) << 48;
	gate[1] = handler >> 32;
}

void prepare_ring0(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) idt = {0xfff, 0x2000};

	for (u64 vector = 0; vector < 32; vector++)
		set_gate(vector, (u64)(vector == 6 ? on_ud2 : on_trouble));
	out8(0x21, 0xff); /* no interrupts from either PIC */
	out8(0xa1, 0xff);
	*(volatile u64 *)0x1104 = 0x20000; /* TSS: stack of ring 0 */
	__asm__ volatile("lidt %0" : : "m"(idt));
	__asm__ volatile("ltr %w0" : : "r"(0x38));
}

/* ---- ring 3 ---- */

static u64 call(enum call number, const void *argument, u64 length)
{
	u64 result;
	__asm__ volatile("ud2"
			 : "=a"(result)
			 : "D"((u64)number), "S"(argument), "d"(length)
			 : "memory");
	return result;
}

static u64 put_text(char *line, u64 at, const char *text)
{
	while (*text)
		line[at++] = *text++;
	return at;
}

static u64 put_number(char *line, u64 at, u64 value)
{
	char digits[20];
	u64 count = 0;

	do
		digits[count++] = (char)('0' + value % 10);
	while (value /= 10);
	while (count)
		line[at++] = digits[--count];
	return at;
}

void ring3_main(void)
{
	char line[128];
	u64 at;

	fill(AREA, AREA_WORDS);
	call(CALL_FILL, 0, 0);
	at = put_text(line, 0, "micro ready ");
	at = put_number(line, at, AREA_WORDS);
	at = put_text(line, at, " ");
	at = put_number(line, at, RING0_WORDS);
	at = put_text(line, at, "\n");
	call(CALL_PRINT, line, at);
	for (u64 pass = 1;; pass++) {
		u64 bad = verify(AREA, AREA_WORDS);
		u64 bad_ring0 = call(CALL_VERIFY, 0, 0);
		at = put_text(line, 0, "micro pass ");
		at = put_number(line, at, pass);
		at = put_text(line, at, " bad ");
		at = put_number(line, at, bad);
		at = put_text(line, at, " ");
		at = put_number(line, at, bad_ring0);
		at = put_text(line, at, "\n");
		call(CALL_PRINT, line, at);
	}
}
