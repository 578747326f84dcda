"""Kernels of the losses and of what follows a backward pass: tensors in, tensors out.

Installs as `immunity_fast.kernels`, imports nothing else of it. Names in all kernels:

    x_ptr         where tensor x begins; its shape and dtype stand beside it, and "out" where the kernel writes it
    x_ptrs        a block of pointers into it
    x_stride_n    elements from one entry of x to the next along an axis: n experts, b samples, c channels, k classes,
                  h rows, w columns; a tensor without strides is contiguous
    grad_x        ∂L/∂x; in the losses, `gradients` are Grad-CAM's ∂y/∂A and `activations` its A
    CAPITALS      known when the kernel is compiled, like whatever else is a `tl.constexpr`
"""
