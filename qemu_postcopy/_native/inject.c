#define _GNU_SOURCE
#include "inject.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inject_registers.h"
#include "uffd.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

int qpc_fd_take(int pidfd, int remote_fd, struct qpc_error *err)
{
    int fd = (int)syscall(SYS_pidfd_getfd, pidfd, remote_fd, 0);

    if (fd >= 0)
        return fd;
    if (errno == ESRCH)
        return qpc_error_set(err, QPC_GONE, errno, "the process has exited");
    if (errno == ENOSYS)
        return qpc_error_set(err, QPC_UNSUPPORTED, errno, "pidfd_getfd(2) needs Linux 5.6");
    return qpc_error_set(err, errno == EPERM ? QPC_REFUSED : QPC_SYSTEM, errno,
                         "cannot take descriptor %d over (pidfd_getfd)", remote_fd);
}

int qpc_capability_drop_ptrace(struct qpc_error *err)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    const uint32_t keep = ~CAP_TO_MASK(CAP_SYS_PTRACE);

    if (syscall(SYS_capget, &header, sets) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "capget failed");
    sets[CAP_TO_INDEX(CAP_SYS_PTRACE)].effective &= keep;
    sets[CAP_TO_INDEX(CAP_SYS_PTRACE)].permitted &= keep;
    sets[CAP_TO_INDEX(CAP_SYS_PTRACE)].inheritable &= keep;
    if (syscall(SYS_capset, &header, sets) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "cannot drop CAP_SYS_PTRACE (capset)");
    return 0;
}

#if (defined(__x86_64__) && !defined(__ILP32__)) || (defined(__aarch64__) && defined(__LP64__))

/* The System V ABI lets a leaf function use 128 bytes below the stack pointer (x86-64). */
enum { RED_ZONE_BYTES = 128, VDSO_MAX_BYTES = 1 << 20, GRACE_MS = 1000, SCRATCH_BYTES = 512 };

/* What the calls in the target read and write, below the red zone of the lent stack. */
struct scratch {
    char device_path[32];
    struct sockaddr_un address;
    struct msghdr message;
    struct iovec part;
    char byte;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
};

_Static_assert(sizeof(struct scratch) <= SCRATCH_BYTES, "the scratch area lies in one page");

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- before the stop: a system call instruction in the target's own code ---- */

/* Looks for one in [start, end) of the target; 0 if there is none. */
static uint64_t search_range(int memory, uint64_t start, uint64_t end)
{
    size_t length = end - start < VDSO_MAX_BYTES ? end - start : VDSO_MAX_BYTES;
    unsigned char *code = malloc(length);
    uint64_t found = 0;
    ssize_t got;

    if (!code)
        return 0;
    got = pread(memory, code, length, (off_t)start);
    for (ssize_t i = 0; i + (ssize_t)sizeof(syscall_instruction) <= got;
         i += INSTRUCTION_ALIGNMENT) {
        if (memcmp(code + i, syscall_instruction, sizeof(syscall_instruction)) == 0) {
            found = start + (uint64_t)i;
            break;
        }
    }
    free(code);
    return found;
}

/* The vDSO has one in every process that has a vDSO; else the C library or the program itself. */
static uint64_t find_instruction(int pid, int memory)
{
    uint64_t found = 0;
    char path[64];
    char *line = NULL;
    size_t size = 0;

    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    for (int vdso = 1; vdso >= 0 && !found; vdso--) {
        FILE *maps = fopen(path, "re");

        if (!maps)
            break;
        while (!found && getline(&line, &size, maps) > 0) {
            unsigned long start, end;
            char permissions[5];

            if (sscanf(line, "%lx-%lx %4s", &start, &end, permissions) != 3)
                continue;
            if (permissions[0] != 'r' || permissions[2] != 'x')
                continue;
            if (vdso == (strstr(line, "[vdso]") != NULL))
                found = search_range(memory, start, end);
        }
        fclose(maps);
    }
    free(line);
    return found;
}

/* ---- the child: async-signal-safe calls only ---- */

struct request {
    int pid, pidfd, memory, count, per_thread_ms;
    const int *tids;
    uint64_t instruction, deadline_ns;
    uint64_t discard_start, discard_length; /* bytes; 0: a userfaultfd is wanted */
    int device_fd; /* to be passed over this socket, or -1 */
    int listener;
    struct sockaddr_un address;
    socklen_t address_bytes;
};

/* What the child tells its parent; lies in a shared page. */
struct answer {
    struct qpc_injection injection;
    struct qpc_error error;
    int result;
    bool complete;
};

enum attempt { ATTEMPT_DONE, ATTEMPT_NEXT_THREAD, ATTEMPT_FAILED };

static bool target_exited(int pidfd)
{
    struct pollfd end = { .fd = pidfd, .events = POLLIN };

    return poll(&end, 1, 0) > 0;
}

static bool is_thread_of(int pid, int tid)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/task/%d", pid, tid);
    return access(path, F_OK) == 0;
}

static bool is_interrupt_stop(int status)
{
    /* With PTRACE_SEIZE this is also how a stop by SIGSTOP shows; the thread goes back to it. */
    return WIFSTOPPED(status) && (status >> 16) == PTRACE_EVENT_STOP;
}

/* Waits until the seized thread stands still. 0, or -1 where it does not, or has ended. */
static int wait_stopped(pid_t tid, uint64_t deadline_ns)
{
    struct timespec pause = { .tv_nsec = 10000 };

    if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) < 0)
        return -1;
    for (;;) {
        int status;
        pid_t got = waitpid(tid, &status, WNOHANG | __WALL);

        if (got < 0 || (got == tid && !WIFSTOPPED(status)))
            return -1;
        if (got == tid && is_interrupt_stop(status))
            return 0;
        if (got == tid) {
            /* A signal was faster and has used our interrupt up: let it through, ask again. */
            if (ptrace(PTRACE_CONT, tid, 0, WSTOPSIG(status)) < 0 ||
                ptrace(PTRACE_INTERRUPT, tid, 0, 0) < 0)
                return -1;
            continue;
        }
        if (now_ns() >= deadline_ns)
            return -1;
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < 1000000)
            pause.tv_nsec *= 2;
    }
}

static int get_registers(pid_t tid, registers *regs)
{
    struct iovec set = { regs, sizeof(*regs) };

    if (ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &set) < 0)
        return -1;
    /* A 32-bit program has a smaller set. */
    if (set.iov_len != sizeof(*regs)) {
        errno = ENOEXEC;
        return -1;
    }
    return 0;
}

static int set_registers(pid_t tid, const registers *regs)
{
    struct iovec set = { (void *)regs, sizeof(*regs) };

    return ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &set) < 0 ? -1 : 0;
}

/*
 * Runs one system call in the stopped thread: it stops at the entry and at the exit. There is no
 * time limit here: to go away in the middle would leave the thread with our registers, and none
 * of the calls made sleeps. Returns what the kernel answered, or -ESRCH when the thread died.
 */
static int64_t call_in_target(pid_t tid, const registers *saved, uint64_t at, long number,
                              const uint64_t args[4])
{
    registers regs = *saved;
    int stops = 0;

    prepare_call(&regs, at, number, args);
    if (set_registers(tid, &regs) < 0)
        return -ESRCH;
    while (stops < 2) {
        int status;
        pid_t got;

        if (ptrace(PTRACE_SYSCALL, tid, 0, 0) < 0)
            return -ESRCH;
        do
            got = waitpid(tid, &status, __WALL);
        while (got < 0 && errno == EINTR);
        if (got < 0 || !WIFSTOPPED(status))
            return -ESRCH;
        /* PTRACE_O_TRACESYSGOOD marks system call stops; a SIGSTOP may still come in between. */
        if (WSTOPSIG(status) == (SIGTRAP | 0x80))
            stops++;
    }
    return get_registers(tid, &regs) < 0 ? -ESRCH : call_result(&regs);
}

/* The target's connection among those that wait; others (the name is not secret) are closed. */
static int accept_target(const struct request *request)
{
    int connection;

    while ((connection = accept4(request->listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        struct ucred peer;
        socklen_t size = sizeof(peer);

        if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 &&
            peer.pid == request->pid)
            return connection;
        close(connection);
    }
    return -1;
}

static int send_descriptor(int connection, int fd)
{
    char byte = 0;
    struct iovec part = { &byte, 1 };
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = { .header = { .cmsg_len = CMSG_LEN(sizeof(int)),
                              .cmsg_level = SOL_SOCKET,
                              .cmsg_type = SCM_RIGHTS } };
    const struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                                    .msg_controllen = sizeof(control) };

    memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
    return sendmsg(connection, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == 1 ? 0 : -1;
}

/* The number under which the target has received the descriptor that lies in its queue, or -errno. */
static int64_t receive_in_target(const struct request *request, pid_t tid,
                                 const registers *saved, uint64_t base, int64_t remote_socket)
{
    const uint64_t args[4] = { (uint64_t)remote_socket, base + offsetof(struct scratch, message),
                               MSG_DONTWAIT | MSG_CMSG_CLOEXEC, 0 };
    struct cmsghdr header;
    int fd = -EBADMSG;
    const off_t control = (off_t)(base + offsetof(struct scratch, control));
    int64_t got = call_in_target(tid, saved, request->instruction, SYS_recvmsg, args);

    if (got < 0)
        return got;
    if (pread(request->memory, &header, sizeof(header), control) != (ssize_t)sizeof(header) ||
        header.cmsg_len != CMSG_LEN(sizeof(int)) || header.cmsg_type != SCM_RIGHTS ||
        pread(request->memory, &fd, sizeof(fd), control + (off_t)CMSG_LEN(0)) !=
            (ssize_t)sizeof(fd))
        return -EBADMSG; /* a security module may hold the descriptor back (unix(7)) */
    return fd;
}

/* Has the target connect to our socket, and gives it device_fd. Returns its number, or -errno. */
static int64_t pass_to_target(const struct request *request, pid_t tid, const registers *saved,
                              uint64_t base)
{
    const uint64_t at = request->instruction;
    const uint64_t socket_args[4] = { AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, 0 };
    int64_t remote_socket, result;
    int connection = -1;

    if (request->device_fd < 0)
        return -EBADF;
    remote_socket = call_in_target(tid, saved, at, SYS_socket, socket_args);
    if (remote_socket < 0)
        return remote_socket;
    const uint64_t connect_args[4] = { (uint64_t)remote_socket,
                                       base + offsetof(struct scratch, address),
                                       request->address_bytes, 0 };
    const uint64_t close_args[4] = { (uint64_t)remote_socket, 0, 0, 0 };

    result = call_in_target(tid, saved, at, SYS_connect, connect_args);
    if (result == 0) {
        connection = accept_target(request);
        result = connection < 0 || send_descriptor(connection, request->device_fd) < 0
                     ? -ECONNABORTED
                     : receive_in_target(request, tid, saved, base, remote_socket);
    }
    if (connection >= 0)
        close(connection);
    call_in_target(tid, saved, at, SYS_close, close_args);
    return result;
}

/* Makes a userfaultfd of the target's descriptor of the device, which is closed. */
static int64_t make_in_target(pid_t tid, const registers *saved, uint64_t at, int64_t device)
{
    const uint64_t new_args[4] = { (uint64_t)device, USERFAULTFD_IOC_NEW,
                                   O_CLOEXEC | O_NONBLOCK, 0 };
    const uint64_t close_args[4] = { (uint64_t)device, 0, 0, 0 };
    int64_t uffd = call_in_target(tid, saved, at, SYS_ioctl, new_args);

    call_in_target(tid, saved, at, SYS_close, close_args);
    return uffd;
}

/*
 * The calls themselves; base is where the scratch area lies in the target. Returns the new
 * descriptor's number, or -1 with all errno values set.
 */
static int open_in_target(const struct request *request, pid_t tid, const registers *saved,
                          uint64_t base, struct qpc_injection *injection)
{
    const uint64_t at = request->instruction;
    const uint64_t open_args[4] = { (uint64_t)AT_FDCWD,
                                    base + offsetof(struct scratch, device_path),
                                    O_RDWR | O_CLOEXEC, 0 };
    int64_t result = call_in_target(tid, saved, at, SYS_openat, open_args);

    if (result >= 0)
        result = make_in_target(tid, saved, at, result);
    if (result >= 0)
        return (int)result;
    injection->device_errno = (int)-result;
    result = pass_to_target(request, tid, saved, base);
    if (result >= 0)
        result = make_in_target(tid, saved, at, result);
    if (result >= 0)
        return (int)result;
    injection->passed_errno = (int)-result;
    result = call_in_target(tid, saved, at, SYS_userfaultfd,
                            (const uint64_t[4]){ O_CLOEXEC | O_NONBLOCK });
    if (result >= 0)
        return (int)result;
    injection->syscall_errno = (int)-result;
    return -1;
}

static void fill_scratch(struct scratch *scratch, const struct request *request, uint64_t base)
{
    memset(scratch, 0, sizeof(*scratch));
    strcpy(scratch->device_path, "/dev/userfaultfd");
    scratch->address = request->address;
    scratch->part.iov_base = (void *)(uintptr_t)(base + offsetof(struct scratch, byte));
    scratch->part.iov_len = 1;
    scratch->message.msg_iov = (void *)(uintptr_t)(base + offsetof(struct scratch, part));
    scratch->message.msg_iovlen = 1;
    scratch->message.msg_control = (void *)(uintptr_t)(base + offsetof(struct scratch, control));
    scratch->message.msg_controllen = sizeof(scratch->control);
}

/* Opens the descriptor; what the calls need lies on the thread's stack meanwhile. */
static enum attempt open_with_stack(const struct request *request, pid_t tid,
                                    const registers *saved, struct answer *answer)
{
    struct qpc_injection *injection = &answer->injection;
    char saved_bytes[SCRATCH_BYTES];
    struct scratch scratch;
    /* Aligned to its own size, so that it lies in one page. */
    uint64_t base = (stack_pointer(saved) - RED_ZONE_BYTES - SCRATCH_BYTES) &
                    ~(uint64_t)(SCRATCH_BYTES - 1);

    if (pread(request->memory, saved_bytes, sizeof(saved_bytes), (off_t)base) !=
        (ssize_t)sizeof(saved_bytes))
        return ATTEMPT_NEXT_THREAD;
    fill_scratch(&scratch, request, base);
    if (pwrite(request->memory, &scratch, sizeof(scratch), (off_t)base) ==
        (ssize_t)sizeof(scratch))
        injection->remote_fd = open_in_target(request, tid, saved, base, injection);
    else
        injection->device_errno = injection->syscall_errno = errno;
    if (pwrite(request->memory, saved_bytes, sizeof(saved_bytes), (off_t)base) !=
        (ssize_t)sizeof(saved_bytes)) {
        qpc_error_set(&answer->error, QPC_GONE, 0, "thread %d died during the attach", tid);
        return ATTEMPT_FAILED;
    }
    if (injection->remote_fd < 0) {
        qpc_error_set(&answer->error, QPC_REFUSED, injection->device_errno,
                      "the target may not open a userfaultfd");
        return ATTEMPT_FAILED;
    }
    return ATTEMPT_DONE;
}

/* Drops a range of private pages. */
static enum attempt discard(const struct request *request, pid_t tid, const registers *saved,
                            struct answer *answer)
{
    uint64_t args[4] = { request->discard_start, request->discard_length, MADV_DONTNEED_LOCKED };
    int64_t result = call_in_target(tid, saved, request->instruction, SYS_madvise, args);

    if (result == -EINVAL) { /* before Linux 5.18; there it cannot be done to locked pages */
        args[2] = MADV_DONTNEED;
        result = call_in_target(tid, saved, request->instruction, SYS_madvise, args);
    }
    if (result == 0)
        return ATTEMPT_DONE;
    qpc_error_set(&answer->error, QPC_REFUSED, (int)-result, "its pages cannot be dropped");
    return ATTEMPT_FAILED;
}

/* With the thread standing still: lend its registers, run the calls, give all back. */
static enum attempt work_in_stopped(const struct request *request, pid_t tid,
                                    struct answer *answer)
{
    uint64_t saved_mask, every_signal = ~(uint64_t)0;
    enum attempt attempt;
    registers saved;
    int restored;

    if (get_registers(tid, &saved) < 0) {
        qpc_error_set(&answer->error, errno == ENOEXEC ? QPC_UNSUPPORTED : QPC_GONE,
                      errno == ENOEXEC ? 0 : errno, "%s",
                      errno == ENOEXEC ? "the target is a 32-bit program"
                                       : "the thread ended while it was looked at");
        return ATTEMPT_FAILED;
    }
    if (ptrace(PTRACE_GETSIGMASK, tid, sizeof(saved_mask), &saved_mask) < 0 ||
        ptrace(PTRACE_SETSIGMASK, tid, sizeof(every_signal), &every_signal) < 0)
        return ATTEMPT_NEXT_THREAD;
    attempt = request->discard_length ? discard(request, tid, &saved, answer)
                                      : open_with_stack(request, tid, &saved, answer);
    restored = ptrace(PTRACE_SETSIGMASK, tid, sizeof(saved_mask), &saved_mask) == 0;
    restored &= set_registers(tid, &saved) == 0 && restore_call_state(tid) == 0;
    if (!restored) {
        qpc_error_set(&answer->error, QPC_GONE, 0, "thread %d died during the attach", tid);
        return ATTEMPT_FAILED;
    }
    return attempt;
}

/* `again`: it is seized already, and was not to be stopped so far. */
static enum attempt try_thread(const struct request *request, pid_t tid, bool again,
                               struct answer *answer)
{
    struct qpc_injection *injection = &answer->injection;
    uint64_t started = now_ns(), stopped;
    uint64_t deadline = started + (uint64_t)request->per_thread_ms * 1000000u;
    enum attempt attempt;

    if (!again && ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD) < 0) {
        if (errno == ESRCH)
            return ATTEMPT_NEXT_THREAD; /* ended since it was listed */
        qpc_error_set(&answer->error, errno == EPERM ? QPC_REFUSED : QPC_SYSTEM, errno,
                      "cannot trace process %d", request->pid);
        return ATTEMPT_FAILED;
    }
    /* Seized, its id cannot pass to another any more, so now the question has an answer. */
    if (target_exited(request->pidfd) || !is_thread_of(request->pid, tid))
        return ATTEMPT_NEXT_THREAD;
    if (wait_stopped(tid, deadline < request->deadline_ns ? deadline : request->deadline_ns) < 0)
        return ATTEMPT_NEXT_THREAD;
    stopped = now_ns();
    injection->tid = tid;
    injection->wait_ns = stopped - started;
    attempt = work_in_stopped(request, tid, answer);
    ptrace(PTRACE_DETACH, tid, 0, 0);
    injection->stop_ns = now_ns() - stopped;
    return attempt;
}

static int try_threads(const struct request *request, struct answer *answer)
{
    static const struct timespec pause = { .tv_nsec = 1000000 };

    answer->injection.remote_fd = -1;
    /* Round and round: on a busy machine a thread may not run, and so not stop, for a while. */
    for (bool again = false; now_ns() < request->deadline_ns && !target_exited(request->pidfd);
         again = true) {
        for (int i = 0; i < request->count && now_ns() < request->deadline_ns; i++) {
            if (!again)
                answer->injection.threads_tried++;
            switch (try_thread(request, request->tids[i], again, answer)) {
            case ATTEMPT_DONE:
                return 0;
            case ATTEMPT_FAILED:
                return -1;
            case ATTEMPT_NEXT_THREAD:
                break;
            }
        }
        nanosleep(&pause, NULL);
    }
    if (target_exited(request->pidfd))
        return qpc_error_set(&answer->error, QPC_GONE, 0, "process %d has exited", request->pid);
    return qpc_error_set(&answer->error, QPC_TIMEOUT, 0,
                         "none of %d threads of process %d could be stopped in time",
                         answer->injection.threads_tried, request->pid);
}

/* ---- the caller's side ---- */

/* A socket that the target can connect to wherever its files are; the kernel chooses its name. */
static int open_listener(struct request *request)
{
    const struct sockaddr_un any = { .sun_family = AF_UNIX };

    request->address_bytes = sizeof(request->address);
    request->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (request->listener >= 0 &&
        bind(request->listener, (const struct sockaddr *)&any, sizeof(any.sun_family)) == 0 &&
        getsockname(request->listener, (struct sockaddr *)&request->address,
                    &request->address_bytes) == 0 &&
        listen(request->listener, SOMAXCONN) == 0)
        return 0;
    return -1;
}

/* Runs try_threads in a child and waits for it. */
static int run_child(const struct request *request, struct answer *answer, int total_ms,
                     struct qpc_error *err)
{
    sigset_t every_signal, before;
    struct pollfd end = { .events = POLLIN };
    int ready;
    pid_t child;

    sigfillset(&every_signal);
    pthread_sigmask(SIG_SETMASK, &every_signal, &before);
    child = fork();
    if (child == 0) {
        answer->result = try_threads(request, answer);
        __atomic_store_n(&answer->complete, true, __ATOMIC_RELEASE);
        _exit(0);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (child < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "cannot fork");
    end.fd = (int)syscall(SYS_pidfd_open, child, 0);
    do
        ready = poll(&end, end.fd >= 0, total_ms + GRACE_MS);
    while (ready < 0 && errno == EINTR);
    if (end.fd >= 0)
        close(end.fd);
    if (ready <= 0 && !__atomic_load_n(&answer->complete, __ATOMIC_ACQUIRE))
        return qpc_error_set(err, QPC_TIMEOUT, 0,
                             "thread %d is held up inside a system call; process %d puts its "
                             "registers back as soon as it goes on",
                             answer->injection.tid, child);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
    if (!__atomic_load_n(&answer->complete, __ATOMIC_ACQUIRE))
        return qpc_error_set(err, QPC_SYSTEM, 0, "the tracing child was killed");
    return 0;
}

/* What both calls do: check, look for the instruction, let a child work. */
static int inject(struct request request, int total_ms, struct qpc_injection *out,
                  struct qpc_error *err)
{
    const int pid = request.pid, pidfd = request.pidfd;
    struct answer *answer;
    char path[64];
    int result = -1;

    memset(out, 0, sizeof(*out));
    out->remote_fd = -1;
    if (pid <= 0 || request.count <= 0 || request.per_thread_ms <= 0 || total_ms <= 0)
        return qpc_error_set(err, QPC_INVALID, 0, "a PID, threads and time limits are needed");
    if (target_exited(pidfd))
        return qpc_error_set(err, QPC_GONE, 0, "process %d has exited", pid);
    snprintf(path, sizeof(path), "/proc/%d/mem", pid);
    request.memory = open(path, O_RDWR | O_CLOEXEC);
    if (request.memory < 0) {
        if (errno == ENOENT || errno == ESRCH)
            return qpc_error_set(err, QPC_GONE, errno, "process %d has exited", pid);
        return qpc_error_set(err, QPC_REFUSED, errno, "cannot open the memory of process %d", pid);
    }
    answer = mmap(NULL, sizeof(*answer), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    request.instruction = find_instruction(pid, request.memory);
    if (answer == MAP_FAILED) {
        qpc_error_set(err, QPC_SYSTEM, errno, "no memory");
    } else if (!request.instruction) {
        qpc_error_set(err, QPC_UNSUPPORTED, 0, "no system call instruction found in process %d",
                      pid);
    } else if (request.device_fd >= 0 && open_listener(&request) < 0) {
        qpc_error_set(err, QPC_SYSTEM, errno, "cannot make a socket");
    } else {
        request.deadline_ns = now_ns() + (uint64_t)total_ms * 1000000u;
        result = run_child(&request, answer, total_ms, err);
        *out = answer->injection;
        if (result == 0) {
            result = answer->result;
            if (result < 0 && err)
                *err = answer->error;
        }
    }
    if (answer != MAP_FAILED)
        munmap(answer, sizeof(*answer));
    if (request.listener >= 0)
        close(request.listener);
    close(request.memory);
    return result;
}

int qpc_inject_userfaultfd(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                           int total_ms, int device_fd, struct qpc_injection *out,
                           struct qpc_error *err)
{
    return inject((struct request){ .pid = pid, .pidfd = pidfd, .tids = tids, .count = count,
                                    .per_thread_ms = per_thread_ms, .device_fd = device_fd,
                                    .listener = -1 },
                  total_ms, out, err);
}

int qpc_inject_discard(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                       int total_ms, uint64_t start, uint64_t length, struct qpc_error *err)
{
    struct qpc_injection injection;

    if (!length)
        return qpc_error_set(err, QPC_INVALID, 0, "a range is needed");
    return inject((struct request){ .pid = pid, .pidfd = pidfd, .tids = tids, .count = count,
                                    .per_thread_ms = per_thread_ms, .device_fd = -1,
                                    .listener = -1, .discard_start = start,
                                    .discard_length = length },
                  total_ms, &injection, err);
}

#else

int qpc_inject_userfaultfd(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                           int total_ms, int device_fd, struct qpc_injection *out,
                           struct qpc_error *err)
{
    return qpc_error_set(err, QPC_UNSUPPORTED, 0,
                         "ptrace injection is written for 64-bit x86 and ARM only");
}

int qpc_inject_discard(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                       int total_ms, uint64_t start, uint64_t length, struct qpc_error *err)
{
    return qpc_error_set(err, QPC_UNSUPPORTED, 0,
                         "ptrace injection is written for 64-bit x86 and ARM only");
}

#endif
