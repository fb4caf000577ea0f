// Launches of recurrent cells, and of attentional vectors. See cells.cuh.
#pragma once
#include "cells.cuh"
#include "launch.h"

namespace seq2seq_fast {

void launch_advance(const Device& device, Cell cell, const CellArguments& a);
void launch_retreat(const Device& device, Cell cell, const CellBackwardArguments& a);
void launch_sum(const Device& device, const SumArguments& a);
void launch_scale(const Device& device, const ScaleArguments& a);
void launch_vector(const Device& device, const VectorArguments& a);
void launch_vector_backward(const Device& device, const VectorBackwardArguments& a);

}  // namespace seq2seq_fast
