/* Arrays of length-prefixed strings, as GGUF has them: u64 length (little endian), then the bytes.
 * A vocabulary has half a million of these; a loop in Python takes 0.2 microseconds for each. */
#pragma once

#include <stdint.h>

/* Step over at most `count` strings of `data` [size], starting at *pos. Returns how many were stepped
 * over and sets *pos to the end of the last, which may lie beyond `size` (INT64_MAX if absurdly far):
 * stops where the next length is not wholly within the data. */
uint64_t fomoe_strings_skip(const uint8_t *data, uint64_t size, uint64_t count, uint64_t *pos);

/* Write the `count` strings that fill `data` [size] to `out` [size], each followed by `separator`.
 * Returns the bytes written, or -EINVAL when the strings do not fill the data exactly. */
int64_t fomoe_strings_join(const uint8_t *data, uint64_t size, uint64_t count, uint8_t separator,
                           uint8_t *out);
