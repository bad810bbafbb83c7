"""Run unmodified models on adapted weights.

`lift` traces a function, and runs its program with a `LiftedWeight` (base + u @ v) in
place of each adapted weight. The layout of such a weight has one letter per axis: "b"
batch, "i" input, "o" output. Every operation that meets a weight is looked up here:

primitive            | file           | rule           | layout of the result
-------------------- | -------------- | -------------- | -------------------------------
convert_element_type | rules_layout   | convert_dtype  | kept; array if not floating
transpose            | rules_layout   | transpose      | permuted
reshape              | rules_layout   | reshape        | joined or split within a kind
squeeze              | rules_layout   | squeeze        | letters dropped
broadcast_in_dim     | rules_layout   | broadcast      | letters of new unit axes added
slice                | rules_layout   | slice_static   | kept
dynamic_slice        | rules_layout   | slice_dynamic  | kept
split                | rules_layout   | split          | kept in each piece
unstack              | rules_layout   | unstack        | letter of the axis dropped
rev                  | rules_layout   | reverse        | kept
optimization_barrier | rules_layout   | hold_together  | kept
stop_gradient        | rules_layout   | stop_gradient  | kept
copy                 | rules_layout   | copy           | kept
sharding_constraint  | rules_layout   | shard_base     | kept
neg                  | rules_algebra  | negate         | kept
mul                  | rules_algebra  | scale          | kept; by a number, or by rows
mul                  | rules_algebra  | scale_reversed | kept; by a number, or by rows
div                  | rules_algebra  | divide         | kept; by a number, or by rows
add                  | rules_algebra  | add            | kept, or array
add                  | rules_algebra  | add_reversed   | kept, or array
sub                  | rules_algebra  | subtract       | kept, or array
sub                  | rules_algebra  | subtract_from  | kept, or array
dot_general          | rules_products | multiply_left  | array
dot_general          | rules_products | multiply_right | array
conv_general_dilated | rules_convolve | convolve       | array
ragged_dot_general   | rules_groups   | multiply_stack | array
gather               | rules_lookups  | look_up        | "b" per index axis, or array
remat                | rules_calls    | rematerialize  | as the program inside leaves it
cond                 | rules_calls    | choose_branch  | array
while                | rules_calls    | loop_while     | kept in the carry, or array
scan                 | rules_calls    | scan           | rows drop a "b", stacks add it
custom_vjp_call      | rules_opaque   | run_opaque     | array

A weight that loses all inputs or all outputs is a vector, and becomes an array. So does
a weight to which a larger array is added, such as a table of positions. Any other
operation, or a case that a rule does not cover, needs the full weight: `lift` raises,
or builds it if `materialize=True`. quax itself interprets jit and custom_jvp.
"""

from jlora.lifting.lifted_function import lift, on_merged

__all__ = ["lift", "on_merged"]
