/* How ring 3 asks for something, and puts lines together. */
#include "micro.h"

u64 call(enum call number, const void *argument, u64 length)
{
	u64 result;
	__asm__ volatile("ud2"
			 : "=a"(result)
			 : "D"((u64)number), "S"(argument), "d"(length)
			 : "memory");
	return result;
}

u64 put_text(char *line, u64 at, const char *text)
{
	while (*text)
		line[at++] = *text++;
	return at;
}

u64 put_number(char *line, u64 at, u64 value)
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
