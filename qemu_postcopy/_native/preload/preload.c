/*
 * The preload library: loaded into a QEMU by LD_PRELOAD, it puts guest memory under a userfaultfd
 * as QEMU maps it, for launches in which nobody may trace QEMU.
 *
 *   constructor: connect -> told which memory is guest RAM, and given an open /dev/userfaultfd
 *                -> open a userfaultfd of this process, pass a copy back, wait for the word
 *   mmap of one of those sizes: map -> pass where it is and its file back -> wait for the word
 *                (the other side registers it meanwhile) -> let QEMU have it
 *
 * It acts only in a QEMU system emulator, or in the program that QEMU_POSTCOPY_PRELOAD_PROGRAM
 * names, whose environment has QEMU_POSTCOPY_PRELOAD_SOCKET; anything else that loads it (the shell
 * of a wrapper script, what QEMU starts) is left alone. Whatever goes wrong where it does act ends
 * the process: a guest must never run on memory that nobody fills. With QEMU_POSTCOPY_PRELOAD_OPTIONAL
 * it does not act where nobody listens at that socket, or whoever does wants nothing: for a QEMU that
 * loads a whole guest by itself then, as from a libvirt domain that keeps these variables. Once all the memory it was told
 * of is mapped, or before it was told of any, every function here is the system call and no more:
 * safe in signal handlers and in any thread. The userfaultfd stays open for the process's life.
 *
 * Plain C, nothing but libc; knows no Python. vm/preload.py is the other side.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MCL_ONFAULT
#define MCL_ONFAULT 4
#endif

#define SOCKET_VARIABLE "QEMU_POSTCOPY_PRELOAD_SOCKET"
#define PROGRAM_VARIABLE "QEMU_POSTCOPY_PRELOAD_PROGRAM"
#define OPTIONAL_VARIABLE "QEMU_POSTCOPY_PRELOAD_OPTIONAL"
#define LIBRARY_VARIABLE "LD_PRELOAD"
#define LIBRARY_NAME "qemu-postcopy-preload.so"

enum { MOST_BLOCKS = 64, ANSWER_SECONDS = 60, EXIT_STATUS = 97 };

/* One message of SOCK_SEQPACKET each; vm/preload.py has the same layout. */
#define PROTOCOL 0x31504351u /* "QCP1", little-endian */
enum kind {
    WELCOME = 1,
    DESCRIPTOR = 2,
    MAPPED = 3,
    GO_ON = 4,
    REFUSED = 5,
    STREAM = 6, /* beside the word after DESCRIPTOR: the descriptor that comes along takes the place */
    LEAVE = 7,  /* of `number`. LEAVE instead of WELCOME: nothing is wanted of this process */
};

struct message {
    uint32_t protocol;
    uint32_t kind;    /* enum kind */
    int32_t number;   /* DESCRIPTOR: of the userfaultfd here. WELCOME: how many sizes follow.
                         STREAM: which descriptor is replaced */
    uint32_t shared;  /* MAPPED: 1 for MAP_SHARED */
    uint64_t address; /* MAPPED */
    uint64_t length;
    uint64_t offset; /* MAPPED: in the file */
};

struct welcome {
    struct message head;
    uint64_t sizes[MOST_BLOCKS]; /* of the blocks of guest RAM, in bytes */
};

struct refusal {
    struct message head;
    char words[256];
};

static int channel = -1;
static pid_t owner;
/* Guest RAM that is still to come, and what is there: written under the lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t sizes[MOST_BLOCKS];
static struct range {
    uintptr_t start;
    uint64_t length;
} ranges[MOST_BLOCKS];
static _Atomic uint32_t awaited; /* how many of sizes[] are not 0 */
static _Atomic uint32_t mapped;  /* how many of ranges[] are valid */
static _Atomic int active;       /* this process is the one */

static void __attribute__((format(printf, 2, 3), noreturn)) give_up(int errnum,
                                                                    const char *format, ...)
{
    char text[512];
    va_list list;
    int length;

    va_start(list, format);
    length = vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (length < 0 || length >= (int)sizeof(text))
        length = (int)strlen(text);
    dprintf(STDERR_FILENO, "qemu-postcopy preload: %.*s%s%s; QEMU ends before it has a guest\n",
            length, text, errnum ? ": " : "", errnum ? strerror(errnum) : "");
    _exit(EXIT_STATUS);
}

/* Returns the bytes received, 0 at the end or -1; *fd gets the descriptor that came along, or -1. */
static ssize_t try_receive(void *buffer, size_t size, int *fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = { .iov_base = buffer, .iov_len = size };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes) };
    struct cmsghdr *item;
    ssize_t got;

    do
        got = recvmsg(channel, &header, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    *fd = -1;
    if (got <= 0)
        return got;
    item = CMSG_FIRSTHDR(&header);
    if (item && item->cmsg_level == SOL_SOCKET && item->cmsg_type == SCM_RIGHTS &&
        item->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(fd, CMSG_DATA(item), sizeof(int));
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        give_up(0, "the sidecar's message is too long, or no descriptor is free");
    return got;
}

static ssize_t receive(void *buffer, size_t size, int *fd)
{
    ssize_t got = try_receive(buffer, size, fd);

    if (got < 0)
        give_up(errno, "no answer from the sidecar");
    if (got == 0)
        give_up(0, "the sidecar has gone");
    return got;
}

static void tell(const struct message *message, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = { { 0 } };
    struct iovec part = { .iov_base = (void *)(uintptr_t)message, .iov_len = sizeof(*message) };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };
    ssize_t sent;

    if (fd >= 0) {
        struct cmsghdr *item;

        header.msg_control = control.bytes;
        header.msg_controllen = sizeof(control.bytes);
        item = CMSG_FIRSTHDR(&header);
        item->cmsg_level = SOL_SOCKET;
        item->cmsg_type = SCM_RIGHTS;
        item->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(item), &fd, sizeof(int));
    }
    do
        sent = sendmsg(channel, &header, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        give_up(errno, "the sidecar cannot be told");
}

/* What QEMU was told to load its state from is replaced, before it looks at it. */
static void replace_stream(int number, int fd)
{
    if (fd < 0 || number <= STDERR_FILENO || number == channel || fcntl(number, F_GETFD) < 0)
        give_up(0, "the stream to replace is none");
    if (dup2(fd, number) < 0)
        give_up(errno, "the stream cannot be replaced");
    close(fd);
}

static void wait_for_word(void)
{
    struct refusal answer;
    int fd;
    ssize_t got = receive(&answer, sizeof(answer), &fd);

    if (got < (ssize_t)sizeof(answer.head) || answer.head.protocol != PROTOCOL)
        give_up(0, "the sidecar speaks another protocol");
    if (answer.head.kind == STREAM) {
        replace_stream(answer.head.number, fd);
        got = receive(&answer, sizeof(answer), &fd);
        if (got < (ssize_t)sizeof(answer.head) || answer.head.protocol != PROTOCOL)
            give_up(0, "the sidecar speaks another protocol");
    }
    if (fd >= 0)
        close(fd);
    if (answer.head.kind == REFUSED)
        give_up(0, "the sidecar refuses: %.*s", (int)(got - (ssize_t)sizeof(answer.head)),
                answer.words);
    if (answer.head.kind != GO_ON)
        give_up(0, "the sidecar's answer %u is not understood", answer.head.kind);
}

/* Whether this program is the one to act in. */
static int is_meant(void)
{
    const char *wanted = getenv(PROGRAM_VARIABLE);
    char path[4096], *name, *end;
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);

    if (length < 0)
        return 0;
    path[length] = '\0';
    /* Replaced by an update while it was started (proc(5)). */
    end = strstr(path, " (deleted)");
    if (end)
        *end = '\0';
    name = strrchr(path, '/');
    name = name ? name + 1 : path;
    if (wanted && *wanted)
        return !strcmp(wanted, path) || !strcmp(wanted, name);
    return !strncmp(name, "qemu-system-", strlen("qemu-system-")) || !strcmp(name, "qemu-kvm");
}

/* Programs that QEMU starts are to know nothing of this. */
static void clear_environment(void)
{
    const char *loaded = getenv(LIBRARY_VARIABLE);
    char *left, *word, *rest, *copy;

    unsetenv(SOCKET_VARIABLE);
    unsetenv(PROGRAM_VARIABLE);
    unsetenv(OPTIONAL_VARIABLE);
    if (!loaded)
        return;
    /* Paths divided by blanks or colons (ld.so(8)); others' libraries stay. */
    copy = rest = strdup(loaded);
    left = calloc(1, strlen(loaded) + 1);
    if (!copy || !left)
        give_up(ENOMEM, "no memory at the start");
    while ((word = strsep(&rest, " :"))) {
        if (!*word || strstr(word, LIBRARY_NAME))
            continue;
        if (*left)
            strcat(left, ":");
        strcat(left, word);
    }
    if (*left)
        setenv(LIBRARY_VARIABLE, left, 1);
    else
        unsetenv(LIBRARY_VARIABLE);
    free(left);
    free(copy);
}

/* The process that QEMU becomes by -daemonize has an address space of its own, without us. */
static void refuse_daemonize(void)
{
    char words[65536];
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, words, sizeof(words) - 1);

    if (fd >= 0)
        close(fd);
    words[length < 0 ? 0 : length] = '\0';
    for (char *word = words; word < words + length; word += strlen(word) + 1) {
        if (!strcmp(word, "-daemonize") || !strcmp(word, "--daemonize"))
            give_up(0, "-daemonize and a lazy restore exclude each other");
    }
}

static int open_userfaultfd(int device)
{
    int fd = -1;

    if (device < 0)
        device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        give_up(errno, "neither /dev/userfaultfd nor userfaultfd(2) gives a descriptor that gets the "
                       "kernel's faults, as KVM's are");
    return fd;
}

/* Returns 0 where nobody is there, and that is allowed. */
static int connect_to(const char *path, int optional)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct timeval limit = { .tv_sec = ANSWER_SECONDS };

    if (strlen(path) >= sizeof(address.sun_path))
        give_up(0, "the path in " SOCKET_VARIABLE " is too long");
    strcpy(address.sun_path, path);
    channel = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (channel < 0 || setsockopt(channel, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
        setsockopt(channel, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0)
        give_up(errno, "no socket");
    if (connect(channel, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (!optional)
            give_up(errno, "no sidecar at %s", path);
        close(channel);
        channel = -1;
        return 0;
    }
    return 1;
}

/* Whether nothing is wanted of this process. A sidecar that has died or hangs before it wanted
 * anything has changed nothing yet: QEMU loads its guest by itself then. */
static int is_left(const struct welcome *welcome, ssize_t got, int device)
{
    return got <= 0 || (got == (ssize_t)sizeof(welcome->head) &&
                        welcome->head.protocol == PROTOCOL && welcome->head.kind == LEAVE &&
                        device < 0);
}

static void __attribute__((constructor)) begin(void)
{
    const char *path = getenv(SOCKET_VARIABLE);
    struct message report = { .protocol = PROTOCOL, .kind = DESCRIPTOR };
    struct welcome welcome;
    int saved = errno, optional = getenv(OPTIONAL_VARIABLE) != NULL, device;
    ssize_t got;

    if (!path || !is_meant())
        return;
    if (!connect_to(path, optional)) {
        clear_environment();
        errno = saved;
        return;
    }
    if (!optional)
        refuse_daemonize();
    got = optional ? try_receive(&welcome, sizeof(welcome), &device)
                   : receive(&welcome, sizeof(welcome), &device);
    if (optional && is_left(&welcome, got, device)) {
        close(channel);
        channel = -1;
        clear_environment();
        errno = saved;
        return;
    }
    if (optional)
        refuse_daemonize();
    if (got < (ssize_t)sizeof(welcome.head) || welcome.head.protocol != PROTOCOL ||
        welcome.head.kind != WELCOME || welcome.head.number < 1 ||
        welcome.head.number > MOST_BLOCKS ||
        got != (ssize_t)(sizeof(welcome.head) + (size_t)welcome.head.number * sizeof(uint64_t)))
        give_up(0, "the sidecar's welcome is not understood");
    for (int i = 0; i < welcome.head.number; i++)
        sizes[i] = welcome.sizes[i];
    report.number = open_userfaultfd(device);
    tell(&report, report.number);
    wait_for_word();
    clear_environment();
    owner = getpid();
    atomic_store(&awaited, (uint32_t)welcome.head.number);
    atomic_store(&active, 1);
    errno = saved;
}

/* The number of the awaited block that this mapping is, or -1. */
static int find_awaited(uint64_t length, int protection, int flags)
{
    /*
     * QEMU reserves address space first and then maps a RAM block into it, readable, writable and
     * at a fixed address (qemu_ram_mmap, util/mmap-alloc.c); memory of back-ends comes before that
     * of devices. What was taken for guest RAM is compared with QEMU's own list later on.
     */
    if (!(flags & MAP_FIXED) || (protection & (PROT_READ | PROT_WRITE)) != (PROT_READ | PROT_WRITE))
        return -1;
    for (int i = 0; i < MOST_BLOCKS; i++) {
        if (sizes[i] && sizes[i] == length)
            return i;
    }
    return -1;
}

static void *map(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

static void *map_guest_memory(void *address, size_t length, int protection, int flags, int fd,
                              off_t offset)
{
    struct message report = { .protocol = PROTOCOL, .kind = MAPPED };
    int saved = errno, block;
    uint32_t count;
    void *start;

    if (find_awaited(length, protection, flags) < 0)
        return map(address, length, protection, flags, fd, offset);
    pthread_mutex_lock(&lock);
    block = find_awaited(length, protection, flags);
    if (block < 0) { /* another thread was faster */
        pthread_mutex_unlock(&lock);
        return map(address, length, protection, flags, fd, offset);
    }
    if (getpid() != owner)
        give_up(0, "guest memory is mapped by a forked process (-daemonize?)");
    /* Nothing may fill it before it is registered. */
    start = map(address, length, protection, flags & ~(MAP_POPULATE | MAP_LOCKED), fd, offset);
    if (start == MAP_FAILED) {
        pthread_mutex_unlock(&lock);
        return start;
    }
    report.number = fd;
    report.shared = (flags & MAP_TYPE) != MAP_PRIVATE;
    report.address = (uintptr_t)start;
    report.length = length;
    report.offset = (uint64_t)offset;
    tell(&report, flags & MAP_ANONYMOUS ? -1 : fd);
    wait_for_word();
    sizes[block] = 0;
    count = atomic_load(&mapped);
    ranges[count] = (struct range){ (uintptr_t)start, length };
    atomic_store(&mapped, count + 1);
    if (atomic_fetch_sub(&awaited, 1) == 1) {
        close(channel);
        channel = -1;
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return start;
}

EXPORTED void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (atomic_load(&awaited) && (flags & MAP_FIXED))
        return map_guest_memory(address, length, protection, flags, fd, offset);
    return map(address, length, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *address, size_t length, int protection, int flags, int fd,
                      off64_t offset) __attribute__((alias("mmap")));

/*
 * prealloc=on fills guest memory in advance. What is filled from elsewhere stays empty: QEMU is
 * told that it was done (util/oslib-posix.c asks nothing of the memory afterwards).
 */
EXPORTED int madvise(void *address, size_t length, int advice)
{
    uintptr_t start = (uintptr_t)address;

    if (advice == MADV_POPULATE_READ || advice == MADV_POPULATE_WRITE) {
        for (uint32_t i = 0; i < atomic_load(&mapped); i++) {
            if (start >= ranges[i].start && start - ranges[i].start < ranges[i].length)
                return 0;
        }
    }
    return (int)syscall(SYS_madvise, address, length, advice);
}

/* mem-lock=on: pages are locked as they come (mlockall(2)), instead of being brought in at once. */
EXPORTED int mlockall(int flags)
{
    return (int)syscall(SYS_mlockall, atomic_load(&active) ? flags | MCL_ONFAULT : flags);
}
