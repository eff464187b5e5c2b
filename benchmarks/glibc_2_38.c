/* SPDX-License-Identifier: Apache-2.0 */
/* Names that glibc has from 2.38 on, for a peer's wheel that asks for them on older systems. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

unsigned long long __isoc23_strtoull(const char *text, char **end, int base);
int __isoc23_sscanf(const char *text, const char *format, ...);

unsigned long long __isoc23_strtoull(const char *text, char **end, int base)
{
    return strtoull(text, end, base);
}

int __isoc23_sscanf(const char *text, const char *format, ...)
{
    va_list arguments;
    int n;

    va_start(arguments, format);
    n = vsscanf(text, format, arguments);
    va_end(arguments);
    return n;
}
