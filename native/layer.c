#include "layer.h"

#include <time.h>

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

int fomoe_layer_begin(fomoe_layer *layer, const fomoe_moe_last *last, fomoe_moe **moe)
{
    const fomoe_mixer *mixer = layer->mixer;
    int64_t *marks = layer->marks;
    int rc = 0;
    marks[FOMOE_LAYER_BEGUN] = now();
    if (last && last->ids)
        fomoe_moe_pick(last->moe, last->ids, last->weights);
    if (last)
        rc = fomoe_moe_run(last->moe, last->experts, last->num);
    marks[FOMOE_LAYER_RAN] = now();
    if (last && !rc)
        rc = fomoe_moe_finish(last->moe, mixer->x, mixer->ldx);
    if (rc)
        return rc;
    marks[FOMOE_LAYER_SUMMED] = now();
    fomoe_mixer_run(mixer);
    marks[FOMOE_LAYER_MIXED] = now();
    fomoe_route_run(layer->route, mixer->x, mixer->ldx, mixer->tokens, layer->norm);
    marks[FOMOE_LAYER_ROUTED] = now();
    *moe = fomoe_moe_begin(layer->experts, layer->route->h, layer->route->ldh, mixer->tokens);
    return 0;
}
