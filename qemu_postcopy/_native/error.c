#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int qpc_error_set(struct qpc_error *err, enum qpc_code code, int errnum, const char *format, ...)
{
    if (err) {
        va_list args;

        err->code = (int)code;
        err->errnum = errnum;
        va_start(args, format);
        vsnprintf(err->message, sizeof(err->message), format, args);
        va_end(args);
    }
    return -1;
}
