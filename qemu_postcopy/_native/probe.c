#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "uffd.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static const char *const WAY_NAMES[] = {
    [QPC_WAY_DEVICE] = "/dev/userfaultfd",
    [QPC_WAY_SYSCALL] = "userfaultfd(2)",
    [QPC_WAY_USER_MODE] = "userfaultfd(2) with UFFD_USER_MODE_ONLY",
};

static int open_in_way(int way)
{
    int device, uffd, errnum;

    if (way == QPC_WAY_SYSCALL)
        return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (way == QPC_WAY_USER_MODE)
        return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -1;
    uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    errnum = errno;
    close(device);
    errno = errnum;
    return uffd;
}

int qpc_probe_userfaultfd(int way, uint64_t *features, struct qpc_error *err)
{
    struct uffdio_api api = { .api = UFFD_API };
    int uffd;

    if (way < QPC_WAY_DEVICE || way > QPC_WAY_USER_MODE)
        return qpc_error_set(err, QPC_INVALID, 0, "there is no way %d to a userfaultfd", way);
    uffd = open_in_way(way);
    if (uffd < 0)
        return qpc_error_set(err, QPC_REFUSED, errno, "%s", WAY_NAMES[way]);
    /* With no feature asked for, the kernel answers with all it knows, ioctl_userfaultfd(2). */
    if (ioctl(uffd, UFFDIO_API, &api) < 0) {
        int errnum = errno;
        close(uffd);
        return qpc_error_set(err, QPC_SYSTEM, errnum, "%s: UFFDIO_API", WAY_NAMES[way]);
    }
    close(uffd);
    *features = api.features;
    return 0;
}

/*
 * A process that does nothing until it is killed, and never outlives the thread that made it. It is
 * made dumpable, as every program is after execve(2): a copy of a process that has changed its user
 * id is not, and ptrace(2) then asks for a capability. Only async-signal-safe calls between fork and
 * _exit: the caller may have other threads.
 */
static pid_t start_target(void)
{
    pid_t parent = getpid(), pid;
    int ready[2], errnum;
    char byte;

    if (pipe2(ready, O_CLOEXEC) < 0)
        return -1;
    pid = fork();
    errnum = errno;
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_DUMPABLE, 1);
        if (getppid() != parent)
            _exit(0);
        close(ready[0]);
        close(ready[1]);
        for (;;)
            pause();
    }
    close(ready[1]);
    /* The end of the pipe says that the child is as it should be. */
    while (pid > 0 && read(ready[0], &byte, 1) < 0 && errno == EINTR)
        ;
    close(ready[0]);
    errno = errnum;
    return pid;
}

static void stop_target(pid_t pid)
{
    kill(pid, SIGKILL);
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        ;
}

/* The tracer is a process of its own: its end always detaches, and our own waits stay undisturbed. */
static void run_tracer(pid_t stranger)
{
    pid_t target = stranger > 0 ? stranger : start_target();
    int status = 0;

    if (target < 0 || ptrace(PTRACE_SEIZE, target, 0, 0) < 0)
        status = errno;
    if (target > 0 && target != stranger)
        stop_target(target);
    _exit(status);
}

int qpc_probe_ptrace(int stranger, struct qpc_error *err)
{
    pid_t target = -1, tracer;
    int status = 0, errnum;

    if (stranger) {
        target = start_target();
        if (target < 0)
            return qpc_error_set(err, QPC_SYSTEM, errno, "fork");
    }
    tracer = fork();
    errnum = errno;
    if (tracer == 0)
        run_tracer(target);
    if (tracer > 0)
        while (waitpid(tracer, &status, 0) < 0 && errno == EINTR)
            ;
    if (stranger)
        stop_target(target);
    if (tracer < 0)
        return qpc_error_set(err, QPC_SYSTEM, errnum, "fork");
    /* A seccomp filter that kills instead of refusing ends the tracer by SIGSYS. */
    if (WIFSIGNALED(status))
        return qpc_error_set(err, QPC_REFUSED, EPERM, "PTRACE_SEIZE: the tracer was killed");
    if (WEXITSTATUS(status))
        return qpc_error_set(err, QPC_REFUSED, WEXITSTATUS(status), "PTRACE_SEIZE");
    return 0;
}

int qpc_probe_pidfd_getfd(struct qpc_error *err)
{
    int ends[2], pidfd = -1, taken = -1, result = 0;
    char byte = 0;
    pid_t target;

    if (pipe2(ends, O_CLOEXEC) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "pipe2");
    target = start_target();
    if (target < 0) {
        result = qpc_error_set(err, QPC_SYSTEM, errno, "fork");
        close(ends[1]);
        goto close_read_end;
    }
    /* From here on the child alone has the writing end. */
    close(ends[1]);
    pidfd = (int)syscall(SYS_pidfd_open, target, 0);
    if (pidfd < 0) {
        result = qpc_error_set(err, QPC_REFUSED, errno, "pidfd_open");
        goto stop;
    }
    taken = (int)syscall(SYS_pidfd_getfd, pidfd, ends[1], 0);
    if (taken < 0) {
        result = qpc_error_set(err, QPC_REFUSED, errno, "pidfd_getfd");
        goto stop;
    }
    if (write(taken, "q", 1) != 1 || read(ends[0], &byte, 1) != 1 || byte != 'q')
        result = qpc_error_set(err, QPC_REFUSED, EIO, "pidfd_getfd gave another descriptor");
stop:
    stop_target(target);
    if (taken >= 0)
        close(taken);
    if (pidfd >= 0)
        close(pidfd);
close_read_end:
    close(ends[0]);
    return result;
}
