#include "mixer.h"

void fomoe_mixer_run(const fomoe_mixer *m)
{
    const float *mixed = m->attention ? m->attention->out : m->delta->out;
    int64_t ld = m->attention ? m->attention->ldo : m->delta->ld_out;
    fomoe_linear_run(m->inputs, m->x, m->ldx, m->tokens, m->norm);
    if (m->attention)
        fomoe_attention_run(m->attention);
    else
        fomoe_delta_run(m->delta);
    fomoe_linear_run(m->output, mixed, ld, m->tokens, NULL);
}
