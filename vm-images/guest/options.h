/* The guest's options, all given on the kernel command line as qpc.NAME=VALUE. */
#ifndef QPC_OPTIONS_H
#define QPC_OPTIONS_H

#include <stdint.h>

/* The text of qpc.NAME, or `fallback`; valid for ever.  The last of several wins. */
const char *option_text(const char *name, const char *fallback);

/* The same as a number; anything but a decimal number within [lowest, highest] ends the guest with
 * a line that names the option. */
uint64_t option_number(const char *name, uint64_t fallback, uint64_t lowest, uint64_t highest);

#endif
