#include "layer.h"

#include <time.h>

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

/* Runs the last experts of a step and adds them to x. */
static int end(const fomoe_moe_last *last, float *x, int64_t ldx, int64_t *marks)
{
    int rc = 0;
    marks[FOMOE_LAYER_BEGUN] = now();
    if (last && last->ids)
        fomoe_moe_pick(last->moe, last->ids, last->weights);
    if (last)
        rc = fomoe_moe_run(last->moe, last->experts, last->num);
    marks[FOMOE_LAYER_RAN] = now();
    if (last && !rc)
        rc = fomoe_moe_finish(last->moe, x, ldx);
    marks[FOMOE_LAYER_SUMMED] = now();
    return rc;
}

int fomoe_layer_begin(fomoe_layer *layer, const fomoe_moe_last *last, fomoe_moe **moe)
{
    const fomoe_mixer *mixer = layer->mixer;
    int64_t *marks = layer->marks;
    int rc = end(last, mixer->x, mixer->ldx, marks);
    if (rc)
        return rc;
    fomoe_mixer_run(mixer);
    marks[FOMOE_LAYER_MIXED] = now();
    fomoe_route_run(layer->route, mixer->x, mixer->ldx, mixer->tokens, layer->norm);
    marks[FOMOE_LAYER_ROUTED] = now();
    *moe = fomoe_moe_begin(layer->experts, layer->route->h, layer->route->ldh, mixer->tokens);
    if (layer->table)
        fomoe_moe_pick(*moe, layer->route->ids, layer->route->weights);
    fomoe_moe_start(*moe, layer->table);
    return 0;
}

int fomoe_layers_walk(fomoe_layer *const *layers, int first, int num, const fomoe_moe_last *last, int64_t most_ns,
                      fomoe_walk *walk)
{
    int64_t begin = now();
    fomoe_moe_last own;
    for (int i = first; i < num; i++) {
        fomoe_layer *layer = layers[i];
        int rc = fomoe_layer_begin(layer, last, &walk->moe);
        if (rc)
            return rc;
        int found = fomoe_moe_find(walk->moe, layer->table, layer->found);
        walk->begun = found < 0;
        walk->next = walk->begun ? i : i + 1;
        if (walk->begun)
            return 0;
        own = (fomoe_moe_last){ .moe = walk->moe, .experts = layer->found, .num = found };
        last = &own;
        if (now() - begin > most_ns)
            break;
    }
    return end(last, layers[first]->mixer->x, layers[first]->mixer->ldx, walk->marks);
}
