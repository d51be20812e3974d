/* SPIN model of the control word of one session: pins, detaching, removal, sweeping.
 *
 * Two workers serve requests (pin, touch, append, acknowledge, unpin); either may also remove the session (CLOSING)
 * while the other has it pinned. A cleaner detaches, dumps and frees it when it is stale. Each of them may be killed
 * between any two steps; a supervisor then sweeps what it held, and a killed cleaner is started again.
 *
 * An `atomic` or `d_step` block is one atomic instruction on one word (load, store or CAS); everything between two
 * blocks is a place to be killed or overtaken. The word's parts state, owner, pins and seq are one 64-bit word.
 *
 * Claims (asserted):
 *   C1 nobody uses a session that was freed under his pin
 *   C2 a record is acknowledged only if it is in the log, in the dump, or its session was removed by a client
 *   C3 the dump of a session is written once and holds everything acknowledged
 *   C4 at the end no pin bit is set, and no session is left between two states for ever
 *
 * Variants that must FAIL, so that the checks are known to bite:
 *   -DPIN_COUNT    an anonymous count instead of a bit a process: a dead worker's pins cannot be told
 *   -DNO_SEQ       detaching compares the state and pins only: a pin and unpin between the two reads goes unseen (ABA)
 *   -DNO_DUMPED    no state between dump and free: a successor dumps a half-freed session again
 *   -DNO_HEIR      neither the sweep nor the cleaner frees a removed session whose last holder died (either alone
 *                  would do: the cleaner's scan is the second net, for when the index lock was busy)
 */
#define FREE 0
#define ACTIVE 1
#define CLOSING 2
#define DETACHED 3
#define DUMPED 4

#define NW 2          /* workers: process numbers 0, 1 */
#define CLEANER 2
#define SUPER 3
#ifndef CRASHES
#define CRASHES 2     /* deaths in one run */
#endif

byte state = ACTIVE, owner = 0, pins = 0, seq = 0;   /* the control word */
bool stale = false;                                  /* the touch word, compared with the cut-off */
byte head = 0;                                       /* records in the log */
byte acked = 0;                                      /* records acknowledged to clients */
byte dumped = 0, dumps = 0;                          /* records in the dump file; how often it was completed */
bool removed = false;                                /* a client removed the session: what it held may go */
bool using[NW];                                      /* a worker relies on the session's memory */
bool dead[NW]; bool cleaner_dead = false, cleaner_done = false;
byte done = 0, crashes = 0;

#ifdef NO_SEQ
#define MOVED
#define SAME_SEQ(q) true
#else
#define MOVED seq = (seq + 1) % 16
#define SAME_SEQ(q) (seq == q)
#endif
#ifdef PIN_COUNT
#define SET_PIN(w) pins = pins + 1
#define DROP_PIN(w) pins = pins - 1
#else
#define SET_PIN(w) pins = pins | (1 << w)
#define DROP_PIN(w) pins = pins & (15 - (1 << w))
#endif

inline may_die(w) { if :: crashes < CRASHES -> crashes++; goto killed :: skip fi }

/* Whoever finds CLOSING without pins takes it for himself by one CAS and frees it. */
inline reap_if_last(me) {
    atomic {
        if :: state == CLOSING && pins == 0 -> state = DUMPED; owner = me; MOVED; mine = true
           :: else -> mine = false
        fi
    }
}
inline free_memory() {
    assert(!using[0] && !using[1]);                  /* C1 */
    head = 0
}

proctype worker(byte w; bool removes) {
    byte left = 2; bool mine = false;
    do
    :: left == 0 -> break
    :: left > 0 ->
        left--;
        atomic { if :: state == ACTIVE -> SET_PIN(w); using[w] = true :: else -> goto out fi }  /* pin: one CAS */
        may_die(w);
        stale = false;                                                          /* touch */
        may_die(w);
        if
        :: removes && left == 0 ->
            atomic { if :: state == ACTIVE -> state = CLOSING; MOVED; removed = true :: else fi }   /* close */
        :: else ->
            /* append: the head CAS; refused if the session is closing (checked after, so the record is simply not
             * acknowledged and goes with the session) */
            atomic { assert(state == ACTIVE || state == CLOSING); head++ }
            may_die(w);
            if :: atomic { state == ACTIVE -> acked++ } :: state != ACTIVE fi       /* reply */
        fi;
        may_die(w);
        atomic { using[w] = false; DROP_PIN(w); MOVED }                         /* unpin */
        may_die(w);
        reap_if_last(w);
        if :: mine -> may_die(w); free_memory(); may_die(w); atomic { state = FREE; MOVED } :: else fi
    od;
out: done++;
    goto end;
killed: atomic { using[w] = false; dead[w] = true };
end: skip
}

proctype cleaner() {
    byte s, p, q; bool old, mine = false;
    if :: state == DETACHED -> goto dump :: state == DUMPED && owner == CLEANER -> goto free :: else fi;
    do
    :: state == FREE -> goto finished
    :: done == NW && !stale && state == ACTIVE -> goto finished      /* time may never pass again */
    :: else ->
        atomic { s = state; p = pins; q = seq };
        old = stale;
        if
        :: s == ACTIVE && p == 0 && old ->
            atomic { if :: state == s && pins == p && SAME_SEQ(q) -> state = DETACHED; owner = CLEANER; MOVED;
                           assert(stale);        /* used since it was judged: not stale */
                           goto dump
                        :: else fi }
#ifdef NO_HEIR
        :: s == CLOSING && done == NW -> goto finished
#else
        :: s == CLOSING && p == 0 -> reap_if_last(CLEANER); if :: mine -> goto free :: else fi
#endif
        :: else
        fi
    od;
dump:
    if :: crashes < CRASHES -> crashes++; goto killed :: skip fi;
    assert(pins == 0);
    assert(dumps == 0 || dumped <= head);            /* C3: a redone dump never holds less */
    atomic { dumped = head; dumps++ };               /* temporary file, fsync, rename onto its own earlier try */
    if :: crashes < CRASHES -> crashes++; goto killed :: skip fi;
#ifndef NO_DUMPED
    atomic { state = DUMPED; MOVED };
#endif
free:
    if :: crashes < CRASHES -> crashes++; goto killed :: skip fi;
    do :: head > 0 -> assert(!using[0] && !using[1]); head--;
          if :: crashes < CRASHES -> crashes++; goto killed :: skip fi
       :: else -> break od;
    atomic { state = FREE; MOVED };
finished: cleaner_done = true; goto end;
killed: cleaner_dead = true;
end: skip
}

proctype clock() { do :: stale = true :: done == NW && cleaner_done -> break od }

proctype supervisor() {
    byte w; bool mine = false;
    do
    :: dead[0] -> w = 0; goto sweep
    :: dead[1] -> w = 1; goto sweep
    :: cleaner_dead -> cleaner_dead = false; run cleaner()
    :: done == NW && cleaner_done && !dead[0] && !dead[1] && !cleaner_dead -> break
    od;
    goto check;
sweep:
#ifdef PIN_COUNT
    atomic { if :: pins > 0 -> DROP_PIN(w); MOVED :: else fi };   /* it can only guess that one of them was his */
#else
    atomic { if :: pins & (1 << w) -> DROP_PIN(w); MOVED :: else fi };
#endif
#ifndef NO_HEIR
    reap_if_last(SUPER);
    if :: mine -> free_memory(); atomic { state = FREE; MOVED } :: else fi;
#endif
    atomic { if :: state == DUMPED && owner == w -> mine = true :: else -> mine = false fi };   /* died while freeing */
    if :: mine -> free_memory(); atomic { state = FREE; MOVED } :: else fi;
    dead[w] = false; done++;
    do
    :: dead[0] -> w = 0; goto sweep
    :: dead[1] -> w = 1; goto sweep
    :: cleaner_dead -> cleaner_dead = false; run cleaner()
    :: done == NW && cleaner_done && !dead[0] && !dead[1] && !cleaner_dead -> break
    od;
check:
    assert(pins == 0);                                            /* C4 */
    assert(state == FREE || state == ACTIVE);
    assert(removed || state == ACTIVE || dumped >= acked);        /* C2 */
    assert(removed || state == FREE || head >= acked)
}

init { atomic { run worker(0, false); run worker(1, true); run cleaner(); run clock(); run supervisor() } }
