/* Network and serial-port I/O from and into memory that nobody has touched since the snapshot.
 *
 * Fills qpc.fill MiB (default 4) with generation 0, gives the kernel PORT_PAGES more pages for the
 * port, reports ready, and waits for the host to say "go" over the network.  Then, a pass each:
 *
 *   network   the first half of the pages goes out, a page to a datagram and not copied by the guest
 *             (MSG_ZEROCOPY), so that the device is the first to touch it; others come in
 *             (PEER_GENERATION).  A page is sent or asked for again until it is answered.
 *   port      the pages given to the kernel go out as they are (splice); then as many come in, into
 *             the last pages of the area (PEER_GENERATION + 1).
 *
 * Last of each, all that has come in and all that must not have changed is verified.
 *
 * A datagram is { u32 what; u32 page; } and for SEND the page's bytes; the host answers each with the
 * same `what` and `page`, and for ASK with the page's bytes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "options.h"
#include "pattern.h"
#include "report.h"

enum {
	UDP_PORT = 7777,
	PEER_GENERATION = 7,
	PORT_PAGES = 256, /* a pipe holds no more without a right of its own (pipe-max-size) */
	ANSWER_MS = 500,
};

enum what { GO = 1, SEND = 2, ASK = 3 };

struct header {
	uint32_t what, page;
};

static int net = -1;
static struct sockaddr_in host = { .sin_family = AF_INET };

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

static void check_page(const uint64_t *page, uint64_t index, unsigned int generation)
{
	uint64_t seed = page_seed(index, generation);

	if (!page_matches(page, seed, false))
		report_bad_page(index, generation, seed, 0, page);
	atomic_fetch_add(&progress.pages, 1);
}

/* eth0 gets qpc.net.2/24, its host is qpc.net.1: that is three numbers with dots between. */
static void start_network(void)
{
	struct ifreq request = { .ifr_name = "eth0" };
	struct sockaddr_in own = { .sin_family = AF_INET, .sin_port = htons(UDP_PORT) };
	char address[64];
	int yes = 1;

	snprintf(address, sizeof(address), "%s.2", option_text("net", "198.18.0"));
	if (inet_pton(AF_INET, address, &own.sin_addr) != 1)
		report_failure("qpc.net: %s is no address", address);
	host.sin_addr.s_addr = htonl(ntohl(own.sin_addr.s_addr) - 1);
	host.sin_port = htons(UDP_PORT);
	net = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	memcpy(&request.ifr_addr, &own, sizeof(own));
	if (net < 0 || ioctl(net, SIOCSIFADDR, &request))
		report_failure("cannot give eth0 %s: %s", address, strerror(errno));
	inet_pton(AF_INET, "255.255.255.0", &((struct sockaddr_in *)&request.ifr_netmask)->sin_addr);
	if (ioctl(net, SIOCSIFNETMASK, &request))
		report_failure("cannot set the netmask: %s", strerror(errno));
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(net, SIOCSIFFLAGS, &request))
		report_failure("cannot set eth0 up: %s", strerror(errno));
	if (setsockopt(net, SOL_SOCKET, SO_ZEROCOPY, &yes, sizeof(yes)) ||
	    bind(net, (struct sockaddr *)&own, sizeof(own)))
		report_failure("cannot use UDP port %d: %s", UDP_PORT, strerror(errno));
}

static void drop_notices(void)
{
	char control[256];
	struct msghdr message = { .msg_control = control, .msg_controllen = sizeof(control) };

	/* One comes for each datagram that went out without a copy. */
	while (recvmsg(net, &message, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
		message.msg_controllen = sizeof(control);
}

/* Waits for an answer to { what, page }, whose bytes go into `into`; false if none comes in time. */
static bool answered(enum what what, uint32_t page, void *into)
{
	uint64_t deadline = now_ns() + ANSWER_MS * 1000000ull;

	for (;;) {
		struct pollfd wait = { .fd = net, .events = POLLIN };
		struct header header = { 0 };
		struct iovec parts[] = { { &header, sizeof(header) }, { into, PAGE_BYTES } };
		struct msghdr message = { .msg_iov = parts, .msg_iovlen = into ? 2 : 1 };

		drop_notices();
		/* So short a wait, because a notice is an error that poll(2) always tells. */
		poll(&wait, 1, 10);
		/* Looked at first: a late answer of another page must not get into this one. */
		ssize_t length = recv(net, &header, sizeof(header), MSG_PEEK | MSG_DONTWAIT);
		bool wanted = header.what == what && header.page == page;
		if (length == sizeof(header) && !wanted)
			recv(net, &header, sizeof(header), MSG_DONTWAIT);
		else if (length == sizeof(header))
			return recvmsg(net, &message, MSG_DONTWAIT) ==
			       (ssize_t)sizeof(header) + (into ? PAGE_BYTES : 0);
		if (now_ns() > deadline)
			return false;
	}
}

static void say(enum what what, uint32_t page, void *bytes, int flags)
{
	static struct header header; /* not on the stack: the device reads it later */
	struct iovec parts[] = { { &header, sizeof(header) }, { bytes, PAGE_BYTES } };
	struct msghdr message = {
		.msg_name = &host,
		.msg_namelen = sizeof(host),
		.msg_iov = parts,
		.msg_iovlen = bytes ? 2 : 1,
	};

	header = (struct header){ what, page };
	if (sendmsg(net, &message, flags) < 0 && errno != ENOBUFS && errno != ENETUNREACH)
		report_failure("cannot send page %u: %s", page, strerror(errno));
}

static void talk_by_network(uint64_t *area, uint32_t out, uint32_t pages)
{
	for (uint32_t i = 0; i < out; i++)
		do
			say(SEND, i, area + (uint64_t)i * PAGE_WORDS, MSG_ZEROCOPY);
		while (!answered(SEND, i, NULL));
	for (uint32_t i = out; i < pages; i++)
		do
			say(ASK, i, NULL, 0);
		while (!answered(ASK, i, area + (uint64_t)i * PAGE_WORDS));
	for (uint32_t i = 0; i < pages; i++)
		check_page(area + (uint64_t)i * PAGE_WORDS, i, i < out ? 0 : PEER_GENERATION);
}

/* Gives the kernel pages that hold generation 1 of the first indices; returns the pipe's end. */
static int give_pages(void)
{
	uint64_t *pages = map_pages(PORT_PAGES);
	struct iovec all = { pages, PORT_PAGES * PAGE_BYTES };
	int ends[2];

	for (uint64_t i = 0; i < PORT_PAGES; i++)
		write_page(pages + i * PAGE_WORDS, page_seed(i, 1), false);
	if (pipe2(ends, O_CLOEXEC) || fcntl(ends[1], F_SETPIPE_SZ, PORT_PAGES * PAGE_BYTES) < 0)
		report_failure("cannot make a pipe of %d pages: %s", PORT_PAGES, strerror(errno));
	if (vmsplice(ends[1], &all, 1, SPLICE_F_GIFT) != (ssize_t)all.iov_len)
		report_failure("vmsplice: %s", strerror(errno));
	/* Only what nobody else maps is handed on as it is, not copied (virtio_console.c, pipe_to_sg). */
	munmap(pages, all.iov_len);
	return ends[0];
}

static void talk_by_port(int pipe, uint64_t *area, uint64_t first)
{
	size_t bytes = PORT_PAGES * PAGE_BYTES, done = 0;
	glob_t ports;

	/* Named by the numbers of the device and of the port. */
	if (glob("/dev/vport*p*", 0, NULL, &ports) || ports.gl_pathc != 1)
		report_failure("there is not one /dev/vport*p*");
	int port = open(ports.gl_pathv[0], O_RDWR | O_CLOEXEC);
	if (port < 0)
		report_failure("cannot open %s: %s", ports.gl_pathv[0], strerror(errno));
	while (done < bytes) {
		ssize_t sent = splice(pipe, NULL, port, NULL, bytes - done, 0);
		if (sent <= 0)
			report_failure("splice into the port: %s", strerror(errno));
		done += (size_t)sent;
	}
	for (done = 0; done < bytes;) {
		ssize_t got = read(port, (char *)(area + first * PAGE_WORDS) + done, bytes - done);
		if (got <= 0)
			report_failure("read from the port: %s after %zu bytes",
				       got ? strerror(errno) : "its end", done);
		done += (size_t)got;
	}
	for (uint64_t i = first; i < first + PORT_PAGES; i++)
		check_page(area + i * PAGE_WORDS, i, PEER_GENERATION + 1);
}

static void pass_done(void)
{
	progress.passes++;
	report_progress();
}

int main(void)
{
	uint64_t mib = option_number("fill", 4, 4, 48), pages = mib * 256;
	uint64_t *area = map_pages(pages);

	for (uint64_t i = 0; i < pages; i++)
		write_page(area + i * PAGE_WORDS, page_seed(i, 0), false);
	int pipe = give_pages();
	start_network();
	report_ready(mib, pages, 0);
	report_start_ticker((unsigned int)option_number("tick_ms", 50, 1, 60000));
	while (!answered(GO, 0, NULL))
		;
	talk_by_network(area, (uint32_t)(pages / 2), (uint32_t)(pages - PORT_PAGES));
	pass_done();
	talk_by_port(pipe, area, pages - PORT_PAGES);
	pass_done();
	for (;;)
		pause();
}
