"""Run unmodified models on adapted weights.

`lift` traces a function, and runs its program with a `LiftedWeight` (base + u @ v) in
place of each adapted weight. The layout of such a weight has one letter per axis: "b"
batch, "i" input, "o" output. Every operation that meets a weight is looked up here:

primitive            | file           | rule           | layout of the result
-------------------- | -------------- | -------------- | -----------------------------
convert_element_type | rules_layout   | convert_dtype  | kept; array if not floating
transpose            | rules_layout   | transpose      | permuted
reshape              | rules_layout   | reshape        | joined or split within a kind
squeeze              | rules_layout   | squeeze        | letters dropped
broadcast_in_dim     | rules_layout   | broadcast      | letters of new unit axes added
slice                | rules_layout   | slice_static   | kept
dynamic_slice        | rules_layout   | slice_dynamic  | kept
split                | rules_layout   | split          | kept in each piece
neg                  | rules_layout   | negate         | kept
mul                  | rules_layout   | scale          | kept; by one number only
mul                  | rules_layout   | scale_reversed | kept; by one number only
div                  | rules_layout   | divide         | kept; by one number only
stop_gradient        | rules_layout   | stop_gradient  | kept
copy                 | rules_layout   | copy           | kept
sharding_constraint  | rules_layout   | shard_base     | kept
dot_general          | rules_products | multiply_left  | array
dot_general          | rules_products | multiply_right | array
conv_general_dilated | rules_products | convolve       | array
gather               | rules_lookups  | look_up        | "b" per index axis, or array
remat                | rules_calls    | rematerialize  | as the program inside leaves it
cond                 | rules_calls    | choose_branch  | array
while                | rules_calls    | loop_while     | kept in the carry, or array
scan                 | rules_calls    | scan           | rows drop a "b", stacks add it
custom_vjp_call      | rules_opaque   | run_opaque     | array

A weight that loses all inputs or all outputs is a vector, and becomes an array. Any
other operation, or a case that a rule does not cover, needs the full weight: `lift`
raises, or builds it if `materialize=True`. quax itself interprets jit and custom_jvp.
"""

from jlora.lifting.lifted_function import lift, on_merged

__all__ = ["lift", "on_merged"]
