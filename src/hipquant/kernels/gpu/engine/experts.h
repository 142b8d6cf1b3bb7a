// What kernels share that multiply with the weights of experts.
#pragma once
#include "device.h"

// Columns `first` to `first` + `columns` - 1 are an expert's; there may be none.
struct alignas(16) ExpertGroup {
    int expert, first, columns, unused;
};
