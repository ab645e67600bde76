#pragma once
#include <nanobind/nanobind.h>

// Adds the class Training: the steps of ../training/training.h on tensors given by their addresses.
void bind_training(nanobind::module_& m);
