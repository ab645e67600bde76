/* The least that runs a program on a bare Cortex-M, with the exit code told to a debugger or emulator by semihosting.
 * An example, and what the emulated tests of bitdial use; a product has its own. */
#include <stdint.h>

extern uint32_t bitdial_data_load[], bitdial_data[], bitdial_data_end[], bitdial_bss[], bitdial_bss_end[], bitdial_stack_top[];

int main(void);
void bitdial_reset(void);
void bitdial_fault(void);

static void leave(uint32_t code) {
    const uint32_t block[2] = {0x20026u, code}; /* the application ended, and how */
    register uint32_t operation __asm__("r0") = 0x20u;
    register const uint32_t *argument __asm__("r1") = block;
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(argument) : "memory");
    for (;;) {
    }
}

void bitdial_fault(void) { leave(99); }

void bitdial_reset(void) {
    const uint32_t *from = bitdial_data_load;
    for (uint32_t *to = bitdial_data; to < bitdial_data_end;) *to++ = *from++;
    for (uint32_t *to = bitdial_bss; to < bitdial_bss_end;) *to++ = 0;
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
    bitdial_stack_top, {bitdial_reset, bitdial_fault, bitdial_fault, bitdial_fault, bitdial_fault, bitdial_fault}
};
