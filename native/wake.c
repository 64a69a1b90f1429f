#include "wake.h"

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

void fomoe_wake(void *fd)
{
    uint64_t one = 1;
    while (write((int)(intptr_t)fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}
