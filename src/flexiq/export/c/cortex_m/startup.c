/* The least that runs a program on a bare Cortex-M, with the exit code told to a debugger or emulator by semihosting.
 * An example, and what the emulated tests of flexiq use; a product has its own. */
#include <stdint.h>

extern uint32_t flexiq_data_load[], flexiq_data[], flexiq_data_end[], flexiq_bss[], flexiq_bss_end[], flexiq_stack_top[];

int main(void);
void flexiq_reset(void);
void flexiq_fault(void);

static void leave(uint32_t code) {
    const uint32_t block[2] = {0x20026u, code}; /* the application ended, and how */
    register uint32_t operation __asm__("r0") = 0x20u;
    register const uint32_t *argument __asm__("r1") = block;
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(argument) : "memory");
    for (;;) {
    }
}

void flexiq_fault(void) { leave(99); }

void flexiq_reset(void) {
    const uint32_t *from = flexiq_data_load;
    for (uint32_t *to = flexiq_data; to < flexiq_data_end;) *to++ = *from++;
    for (uint32_t *to = flexiq_bss; to < flexiq_bss_end;) *to++ = 0;
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: the floating-point unit */
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    leave((uint32_t)main());
}

static const struct {
    const uint32_t *stack;
    void (*handlers[15])(void);
} vectors __attribute__((section(".vectors"), used)) = {
    flexiq_stack_top, {flexiq_reset, flexiq_fault, flexiq_fault, flexiq_fault, flexiq_fault, flexiq_fault}
};
