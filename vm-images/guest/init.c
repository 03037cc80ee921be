/* The first process: mounts what the others need, loads qpc.modules=NAME,NAME and becomes the program that qpc.mode names.
 * Nothing is forked and nothing else runs; when that program ends, the kernel panics, which with
 * panic=-1 on the command line and QEMU's -no-reboot ends the guest. */
#include <errno.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "modules.h"
#include "options.h"
#include "report.h"

static const struct {
	const char *mode;
	const char *argv[4];
} programs[] = {
	{ "check", { "/bin/memcheck" } },
	{ "walk", { "/bin/memwalk" } },
	{ "io", { "/bin/memio" } },
	{ "talk", { "/bin/memtalk" } },
	{ "idle", { "/bin/idle" } },
	{ "shell", { "/bin/busybox", "sh", "/etc/shell" } },
};

static void mount_or_fail(const char *type, const char *where)
{
	if (mount(type, where, type, MS_NOSUID, NULL) && errno != EBUSY)
		report_failure("cannot mount %s: %s", where, strerror(errno));
}

int main(void)
{
	static const char *const environment[] = { "PATH=/bin", "HOME=/", "TERM=linux", NULL };

	mount_or_fail("proc", "/proc");
	mount_or_fail("sysfs", "/sys");
	mount_or_fail("devtmpfs", "/dev");
	modules_load(option_text("modules", ""));
	const char *mode = option_text("mode", "idle");
	for (size_t i = 0; i < sizeof(programs) / sizeof(programs[0]); i++)
		if (!strcmp(mode, programs[i].mode)) {
			execve(programs[i].argv[0], (char *const *)programs[i].argv,
			       (char *const *)environment);
			report_failure("cannot run %s: %s", programs[i].argv[0], strerror(errno));
		}
	report_failure("qpc.mode=%s is not check, walk, io, talk, idle or shell", mode);
}
