#define _GNU_SOURCE
#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "report.h"

static void load_file(const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "/modules/%s", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	/* EEXIST: loaded before, for another one */
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
		report_failure("cannot load %s: %s", path, strerror(errno));
	close(fd);
}

static void load_module(const char *name)
{
	char line[512], *rest;
	FILE *list = fopen("/modules/list", "re");

	if (!list)
		report_failure("cannot read /modules/list: %s", strerror(errno));
	while (fgets(line, sizeof(line), list)) {
		char *word = strtok_r(line, " \n", &rest);
		if (!word || strcmp(word, name))
			continue;
		while ((word = strtok_r(NULL, " \n", &rest)))
			load_file(word);
		fclose(list);
		return;
	}
	report_failure("qpc.modules: there is no module %s in this guest", name);
}

void modules_load(const char *names)
{
	char copy[512], *rest;

	snprintf(copy, sizeof(copy), "%s", names);
	for (char *name = strtok_r(copy, ",", &rest); name; name = strtok_r(NULL, ",", &rest))
		load_module(name);
}
