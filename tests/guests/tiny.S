# SPDX-License-Identifier: Apache-2.0
#
# The tiny guest: a machine with no operating system, 2 KiB of real-mode code that a PC BIOS boots in
# a fraction of a second. It tells on the first serial port what it booted from and which disks the
# BIOS shows, and does as it is told there, one letter at a time.
#
#   sector 0     stage 1: loads sectors 1-4 right behind itself
#   sectors 1-3  stage 2: everything else
#   sector 4     who this disk is: label (32 bytes), guest name (32 bytes), flags (1 byte)
#   sector 5     the mark (32 bytes): what a guest writes to show that it could write
#
# tests/src/guests/tiny.rs fills sectors 4 and 5. Strings end with a NUL.
#
# It says                              when
#   TINY-UP <name> boot=<drive>        it runs
#   TINY-DISK <drive> <label> <mark>   for each BIOS disk; "-" stands for an empty string
#   TINY-READY <name>                  it listens (to the power button, too)
#   TINY-POWERBUTTON                   the button was pressed; flag 1 decides what follows
#   TINY-OFF                           it switches itself off
#
# It obeys   l list the disks again     m mark its own disk        f mark the first other disk ("fix")
#            d write 1.5 MB to its disk t print the tick counter   q power off
#            r reset                    p panic (pvpanic device)   w arm the ib700 watchdog for 2 s
#
# A BIOS under libvirt shows only the disks that have a boot order.

        .set    FLAG_HONOURS_ACPI, 1    # powers off when the button is pressed
        .set    FLAG_FIXES, 2           # marks the first other disk as soon as it is up

        .set    IDENTITY, 0x8400        # sector 4 in memory: 0x7c00 + 4 * 512
        .set    LABEL, IDENTITY
        .set    NAME, IDENTITY + 32
        .set    FLAGS, IDENTITY + 64
        .set    SECTOR, 0x9000          # scratch for one sector
        .set    TEXT, 32                # longest string on disk, with its NUL

        .set    COM1, 0x3f8
        .set    COM1_LSR, COM1 + 5
        .set    PM1_STATUS, 0x600       # where SeaBIOS puts ACPI's power management, on pc and on q35
        .set    PM1_ENABLE, 0x602
        .set    PM1_CONTROL, 0x604
        .set    PM1_BUTTON, 0x100
        .set    PM1_SLEEP_S5, 0x2000
        .set    PVPANIC, 0x505
        .set    IB700, 0x443
        .set    KEYBOARD, 0x64
        .set    BIOS_TICKS, 0x46c

        .macro  say text
        movw    $\text, %si
        call    print
        .endm

        .macro  out8 port, value
        movw    $\port, %dx
        movb    $\value, %al
        outb    %al, %dx
        .endm

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        sti
        cld
        movb    %dl, boot_drive
        movw    $0x7e00, %bx
        movw    $0x0204, %ax            # read 4 sectors
        movw    $0x0002, %cx            # from cylinder 0, sector 2 (they count from 1)
        xorb    %dh, %dh
        int     $0x13
        jc      1f
        jmp     stage2
1:      say     t_unreadable
2:      hlt
        jmp     2b

# %al to the serial port. Keeps all registers.
put:    pushw   %dx
        pushw   %ax
        movw    $COM1_LSR, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popw    %ax
        movw    $COM1, %dx
        outb    %al, %dx
        popw    %dx
        ret

# The string at %si.
print:  lodsb
        testb   %al, %al
        jz      1f
        call    put
        jmp     print
1:      ret

boot_drive:
        .byte   0
t_unreadable:
        .asciz  "TINY-UNREADABLE\r\n"

        .org    510
        .word   0xaa55

# ---- stage 2, at 0x7e00

stage2: say     t_up
        say     NAME
        say     t_boot
        movb    boot_drive, %al
        call    print_hex
        call    newline
        call    list_disks
        testb   $FLAG_FIXES, FLAGS
        jz      1f
        call    fix
1:      movw    $PM1_ENABLE, %dx
        inw     %dx, %ax
        orw     $PM1_BUTTON, %ax
        outw    %ax, %dx
        say     t_ready
        say     NAME
        call    newline

# Wait for the button or a letter; the BIOS timer wakes us 18 times a second.
idle:   sti
        hlt
        movw    $PM1_STATUS, %dx
        inw     %dx, %ax
        testw   $PM1_BUTTON, %ax
        jz      1f
        movw    $PM1_BUTTON, %ax        # writing the bit back clears it
        outw    %ax, %dx
        say     t_button
        testb   $FLAG_HONOURS_ACPI, FLAGS
        jnz     power_off
1:      movw    $COM1_LSR, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      idle
        movw    $COM1, %dx
        inb     %dx, %al
        movw    $orders, %bx
2:      movb    (%bx), %ah              # look the letter up in the table below
        testb   %ah, %ah
        jz      idle
        cmpb    %ah, %al
        je      3f
        addw    $3, %bx
        jmp     2b
3:      call    *1(%bx)
        jmp     idle

orders: .byte   'l'
        .word   list_disks
        .byte   'm'
        .word   mark_own
        .byte   'f'
        .word   fix
        .byte   'd'
        .word   write_much
        .byte   't'
        .word   ticks
        .byte   'q'
        .word   power_off
        .byte   'r'
        .word   reset
        .byte   'p'
        .word   panic
        .byte   'w'
        .word   watchdog
        .byte   0

power_off:
        say     t_off
        movw    $PM1_CONTROL, %dx
        movw    $PM1_SLEEP_S5, %ax
        outw    %ax, %dx
1:      hlt
        jmp     1b

reset:  out8    KEYBOARD, 0xfe
        ret

panic:  say     t_panic
        out8    PVPANIC, 1
        ret

watchdog:
        say     t_watchdog
        out8    IB700, 14               # 30 - 2 * 14 = 2 seconds
        ret

ticks:  say     t_tick
        movb    BIOS_TICKS + 1, %al
        call    print_hex
        movb    BIOS_TICKS, %al
        call    print_hex
        jmp     newline

list_disks:
        movb    $0x80, drive
1:      movw    $0x0005, %cx            # sector 4: the label
        call    read_sector
        jc      2f
        say     t_disk
        movb    drive, %al
        call    print_hex
        call    print_text
        movw    $0x0006, %cx            # sector 5: the mark
        call    read_sector
        jc      2f
        call    print_text
        call    newline
2:      incb    drive
        cmpb    $0x88, drive
        jb      1b
        ret

# Sector %cl (from 1) of `drive` to SECTOR; carry if that cannot be read.
read_sector:
        movw    $0x0201, %ax
        xorb    %dh, %dh
        movb    drive, %dl
        movw    $SECTOR, %bx
        int     $0x13
        ret

# A blank and the string in SECTOR: what is printable of its first bytes, or "-".
print_text:
        movb    $' ', %al
        call    put
        movw    $SECTOR, %si
        movw    $TEXT, %cx
1:      lodsb
        cmpb    $0x21, %al
        jb      2f
        cmpb    $0x7e, %al
        ja      2f
        call    put
        loop    1b
2:      cmpw    $TEXT, %cx
        jne     3f
        movb    $'-', %al
        call    put
3:      ret

# Marks the first disk that we did not boot from.
fix:    movb    $0x80, drive
        cmpb    $0x80, boot_drive
        jne     write_mark
        movb    $0x81, drive
        jmp     write_mark

mark_own:
        movb    boot_drive, %al
        movb    %al, drive

# Writes "by-<name>" to sector 5 of `drive` and says how that went.
write_mark:
        movw    $SECTOR, %di
        movw    $256, %cx
        xorw    %ax, %ax
        rep stosw
        movw    $SECTOR, %di
        movw    $t_by, %si
        call    copy
        movw    $NAME, %si
        call    copy
        movw    $0x0301, %ax
        movw    $0x0006, %cx
        xorb    %dh, %dh
        movb    drive, %dl
        movw    $SECTOR, %bx
        int     $0x13
        movw    $t_marked, %si
        jnc     1f
        movw    $t_mark_failed, %si
1:      call    print
        movb    drive, %al
        call    print_hex
        jmp     newline

# The string at %si to %di, without its NUL.
copy:   lodsb
        testb   %al, %al
        jz      1f
        stosb
        jmp     copy
1:      ret

# Cylinders 1-3 of the boot disk, 16 heads of 63 sectors each.
write_much:
        movb    $1, cylinder
1:      movb    $0, head
2:      movw    $0x033f, %ax
        movb    cylinder, %ch
        movb    $1, %cl
        movb    head, %dh
        movb    boot_drive, %dl
        movw    $0x1000, %bx
        int     $0x13
        jc      3f
        incb    head
        cmpb    $16, head
        jb      2b
        incb    cylinder
        cmpb    $4, cylinder
        jb      1b
        say     t_written
        ret
3:      pushw   %ax
        say     t_io_error
        popw    %ax
        movb    %ah, %al
        call    print_hex
        jmp     newline

# %al as two hexadecimal digits.
print_hex:
        pushw   %ax
        shrb    $4, %al
        call    1f
        popw    %ax
        andb    $15, %al
1:      addb    $'0', %al
        cmpb    $'9', %al
        jbe     2f
        addb    $'a' - '9' - 1, %al
2:      jmp     put

newline:
        say     t_newline
        ret

drive:          .byte   0
cylinder:       .byte   0
head:           .byte   0
t_newline:      .asciz  "\r\n"
t_up:           .asciz  "TINY-UP "
t_boot:         .asciz  " boot="
t_disk:         .asciz  "TINY-DISK "
t_ready:        .asciz  "TINY-READY "
t_button:       .asciz  "TINY-POWERBUTTON\r\n"
t_off:          .asciz  "TINY-OFF\r\n"
t_panic:        .asciz  "TINY-PANIC\r\n"
t_watchdog:     .asciz  "TINY-WATCHDOG-ARMED\r\n"
t_tick:         .asciz  "TINY-TICK "
t_by:           .asciz  "by-"
t_marked:       .asciz  "TINY-MARKED "
t_mark_failed:  .asciz  "TINY-MARK-FAILED "
t_written:      .asciz  "TINY-WRITTEN\r\n"
t_io_error:     .asciz  "TINY-IO-ERROR "

        .org    2048
