#include "options.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "report.h"

/* COMMAND_LINE_SIZE is 2048 on x86 and arm64 (asm/setup.h) */
static char command_line[4096];

static void load_command_line(void)
{
	if (command_line[0])
		return;
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, command_line, sizeof(command_line) - 2);
	if (length <= 0)
		report_failure("cannot read /proc/cmdline: %s", strerror(errno));
	close(fd);
	for (char *c = command_line; *c; c++)
		if (*c == ' ' || *c == '\n')
			*c = '\0'; /* words end in NUL, the list in two */
	command_line[length] = command_line[length + 1] = '\0';
}

const char *option_text(const char *name, const char *fallback)
{
	const char *found = fallback;
	size_t length = strlen(name);

	load_command_line();
	const char *end = command_line + sizeof(command_line);
	for (const char *word = command_line; word < end; word += strlen(word) + 1)
		if (!strncmp(word, "qpc.", 4) && !strncmp(word + 4, name, length) &&
		    word[4 + length] == '=')
			found = word + 4 + length + 1;
	return found;
}

uint64_t option_number(const char *name, uint64_t fallback, uint64_t lowest, uint64_t highest)
{
	const char *text = option_text(name, NULL);
	char *rest;

	if (!text)
		return fallback;
	errno = 0;
	uint64_t value = strtoull(text, &rest, 10);
	if (errno || rest == text || *rest || *text == '-' || value < lowest || value > highest)
		report_failure("qpc.%s=%s is not a number from %llu to %llu", name, text,
			       (unsigned long long)lowest, (unsigned long long)highest);
	return value;
}
