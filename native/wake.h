/* Waking the event loop from a stream of a device.
 *
 * Owns: the host function that a stream calls. Does not know: devices, loops.
 */
#ifndef FOMOE_WAKE_H
#define FOMOE_WAKE_H

/* As cudaHostFn_t and hipHostFn_t: adds 1 to the eventfd whose number `fd` is, cast to a pointer. */
void fomoe_wake(void *fd);

#endif
