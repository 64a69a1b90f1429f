#include "strings.h"

#include <errno.h>
#include <string.h>

#define PREFIX 8

static uint64_t length_at(const uint8_t *data)
{
    uint64_t length;
    memcpy(&length, data, PREFIX); /* every machine that this runs on is little endian */
    return length;
}

uint64_t fomoe_strings_skip(const uint8_t *data, uint64_t size, uint64_t count, uint64_t *pos)
{
    uint64_t at = *pos, done = 0;
    while (done < count && at <= size && size - at >= PREFIX) {
        uint64_t length = length_at(data + at);
        done++;
        if (length > (uint64_t)INT64_MAX - PREFIX - at) {
            at = INT64_MAX;
            break;
        }
        at += PREFIX + length;
    }
    *pos = at;
    return done;
}

int64_t fomoe_strings_join(const uint8_t *data, uint64_t size, uint64_t count, uint8_t separator,
                           uint8_t *out)
{
    uint64_t at = 0, written = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (size - at < PREFIX)
            return -EINVAL;
        uint64_t length = length_at(data + at);
        at += PREFIX;
        if (length > size - at)
            return -EINVAL;
        memcpy(out + written, data + at, length);
        at += length;
        written += length;
        out[written++] = separator;
    }
    return at == size ? (int64_t)written : -EINVAL;
}
