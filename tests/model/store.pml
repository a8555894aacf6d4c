/* One open store: savers, the writer, the sweeper, cleaners and a shutdown, over one lock and one disk.
 *
 * How to read it. A `proctype` is a thread. What stands in `atomic { ... }` happens in one step: it is what the code does
 * while it holds the state lock, or one call of the file system. Between two steps any other thread may run: spin tries
 * every order. `if :: a :: b fi` takes any branch whose first statement can be executed now; `true` always can, so a
 * time-out is a branch that may be taken at any moment, and a fault is one that may be taken while `faults` last.
 * `assert` is a promise. A state in which nobody can go on, and somebody has not ended, is a deadlock; spin reports it.
 * Each piece names the function of snapstore/ that it stands for, and `check` holds the invariants of `_state.py`.
 *
 * Every request has one boundary here, so a key is a request. A job is known by its order of acceptance (`sequence`),
 * a life by its generation. Bytes are counted in snapshots.
 *
 * Each VARIANT_... is a simplification of the protocol that looks harmless. `run.py` shows that each is refuted.
 */

#ifndef SAVES_A
#define SAVES_A 2          /* saves of X by the first saver */
#endif
#ifndef SAVES_B
#define SAVES_B 1          /* saves of X or Y by the second */
#endif
#ifndef CLEANUPS
#define CLEANUPS 2         /* calls of cleanup_request(X) or cleanup_all(), one after the other: time-outs make them overlap */
#endif
#ifndef FAULTS
#define FAULTS 1           /* file operations and copies that fail */
#endif
#ifndef LIMIT
#define LIMIT 2            /* max_pending_jobs */
#endif

#define JOBS (SAVES_A + SAVES_B)
#define SIZE (JOBS + 1)    /* jobs and lives are counted from 1; 0 means none */
#define X 0
#define Y 1
#define A 0
#define B 1

mtype = { NONE, STAGING, QUEUED, WRITING, COMMITTED, CANCELLED, FAILED, POPPED };   /* POPPED: in one variant only */

#define unsettled(j) (state[j] == STAGING || state[j] == QUEUED || state[j] == WRITING || state[j] == POPPED)

/* ---- what is in memory, all of it under the state lock ---------------------------------------------------------- */

mtype state[SIZE] = NONE;      /* SaveTicket.state */
byte life[SIZE];               /* Job.life */
byte writing;                  /* State._writing: the job in the writer's hand */

byte life_of[2];               /* State._lives: request -> its living generation */
byte request_of[SIZE];         /* Life.request_id */
bool alive[SIZE], busy[SIZE], on_disk[SIZE], swept[SIZE], sweep_error[SIZE];
byte waiting[SIZE], staging[SIZE], pending[SIZE], newest[SIZE], committed[SIZE];
bool failed[SIZE], doomed_bytes[SIZE];
bool to_sweep[SIZE];           /* State._to_sweep */
byte in_hand[SIZE];            /* State.cancelled_in_hand */

byte next_generation = 1, next_sequence = 1;
chan turns = [2] of { byte };  /* Room.waiting: first come, first served */
bool closing, writer_may_end, writer_gone, sweeper_may_end, sweeper_gone;
bool writer_asleep, sweeper_asleep;  /* threading.Condition: asleep until somebody notifies */

byte accepted, n_committed, n_cancelled, n_failed, in_flight;  /* Ledger, Room */
byte live_snapshots;
short trash_bytes;

/* ---- what is on disk ------------------------------------------------------------------------------------------- */

bool directory[SIZE];          /* SESSION/<request>.g<generation> */
byte file[SIZE];               /* the job whose bytes stand under the final name in there */
bool temporary[SIZE];          /* .tmp/<random> of a job */
bool in_trash[SIZE];           /* .trash/<random>, with what was the directory of this life */
bool session_removed;
byte faults = FAULTS;

#ifdef VARIANT_ONE_DIRECTORY   /* one directory per request id, not per generation */
#define place(g) (request_of[g] + 1)
#else
#define place(g) (g)           /* invariant 3 */
#endif

/* ---- what only the proof knows ------------------------------------------------------------------------------------ */

bool ended_by_cleanup[SIZE];   /* jobs that existed when a cleanup of their request was called */
bool said_clean[SIZE];         /* lives of which a report said clean=True */
bool given_up[SIZE];           /* jobs that shutdown abandoned at its deadline */
bool replaced[SIZE];           /* jobs whose key a later accepted save has */
byte callers_done;             /* savers, cleaners and shutdown that have returned */
bool shutdown_done, hung;
byte i, n, m;                  /* counters of loops within a d_step, which is one step; 0 outside */

#define letter(r) ('X' + r)

/* Life.swept of all of `mine`; a life that never had a directory has none to be swept. */
#define gone(mine, g) (!(mine & (1 << g)) || swept[g] || !on_disk[g])
#if JOBS == 2
#define all_swept(mine) (gone(mine, 1) && gone(mine, 2))
#elif JOBS == 3
#define all_swept(mine) (gone(mine, 1) && gone(mine, 2) && gone(mine, 3))
#else
#define all_swept(mine) (gone(mine, 1) && gone(mine, 2) && gone(mine, 3) && gone(mine, 4))
#endif


#ifdef VARIANT_COUNTER_BY_ID   /* currency asked from a counter by id, as the first design had it */
#define current(j) (in_hand[request_of[life[j]] + 1] == 0)
#else
#define current(j) alive[life[j]]   /* invariant 4 */
#endif

/* The invariants of _state.py, by their numbers. Evaluated after every step that changes anything. */
inline check() {
  d_step {
    n = 0; m = 0; i = 1;
    do
    :: i < SIZE ->
       if :: unsettled(i) -> n++ :: else fi;
       if :: state[i] == WRITING -> assert(writing == i && busy[life[i]]) :: else fi;               /* 2 */
       if :: state[i] == QUEUED -> assert(alive[life[i]] && pending[life[i]] == i) :: else fi;      /* 7 */
#if !defined(VARIANT_COUNTER_BY_ID) && !defined(VARIANT_POP_BEFORE_BUSY)
       assert(in_hand[i] == ((writing != 0 && life[writing] == i && !alive[i]) -> 1 : 0));          /* 5 */
#endif
       /* 9: nothing of a life that was reported clean exists, or will */
       assert(!(file[i] != 0 && said_clean[life[file[i]]]));
       assert(!(to_sweep[i] && (alive[i] || swept[i])));
       if
       :: alive[i] ->
          m = m + (committed[i] != 0);
          /* what the index names is on disk: a cleanup or a failed save of its key may not have taken it away */
          assert(committed[i] == 0 || busy[i] || file[place(i)] == committed[i]);
          /* what load finds was not there when a cleanup was called */
          assert(pending[i] == 0 || !ended_by_cleanup[pending[i]]);
          assert(committed[i] == 0 || !ended_by_cleanup[committed[i]])
       :: else
       fi;
       i++
    :: else -> break
    od;
    assert(n == in_flight && (in_flight <= LIMIT || in_flight == 1));                               /* 6 */
    assert(accepted == n_committed + n_cancelled + n_failed + in_flight);                           /* 10 */
    assert(live_snapshots == m && trash_bytes >= 0);
    i = 0; n = 0; m = 0
  }
}

/* ---- pieces that run under the lock ----------------------------------------------------------------------------- */

inline notify_writer()  { writer_asleep = false }    /* _work.notify() */
inline notify_sweeper() { sweeper_asleep = false }   /* _dirt.notify() */

inline settle(j, outcome) {    /* _settle_locked, and the ledger: invariant 1 */
  assert(unsettled(j));
  state[j] = outcome;
  if :: writing == j -> writing = 0 :: else fi;
  in_flight--
}

inline leave_pending(j) {      /* _leave_pending_locked: by identity, invariant 7 */
#ifdef VARIANT_POP_BY_KEY
  pending[life[j]] = 0
#else
  if :: pending[life[j]] == j -> pending[life[j]] = 0 :: else fi
#endif
}

inline cancel(j) {             /* _cancel_locked. Who is cancelled without a reason has lost a save. */
  assert(ended_by_cleanup[j] || replaced[j] || given_up[j]);
  leave_pending(j);
  n_cancelled++;
  settle(j, CANCELLED)
}

inline fail(j) {               /* _fail_locked */
  if :: newest[life[j]] <= j -> failed[life[j]] = true :: else fi;
  n_failed++;
  settle(j, FAILED)
}

inline hand_to_sweeper(g) {    /* _to_sweep.append(life): once, or the sweeper buries it twice */
  assert(!to_sweep[g] && !swept[g]);
  to_sweep[g] = true;
  notify_sweeper()
}

inline unlist(g) {             /* _unlist_locked */
  if :: committed[g] != 0 -> committed[g] = 0; live_snapshots-- :: else fi
}

inline end_life(g) {           /* _end_life_locked: drain, forget, mark and count, in one critical section */
  alive[g] = false;
  life_of[request_of[g]] = 0;
  d = pending[g];
  if
  :: d != 0 && state[d] == QUEUED ->
#ifdef VARIANT_COUNT_DRAINED
     in_hand[g]++;
#endif
     cancel(d)
  :: else
  fi;
  d = 0;
#ifndef VARIANT_COUNTER_BY_ID
  if :: writing != 0 && life[writing] == g -> in_hand[g]++ :: else fi;
#endif
  doomed_bytes[g] = (committed[g] != 0);
  trash_bytes = trash_bytes + doomed_bytes[g];
  unlist(g);
  if
#ifdef VARIANT_SWEEP_WHILE_BUSY
  :: on_disk[g] -> hand_to_sweeper(g)
#else
  :: on_disk[g] && !busy[g] -> hand_to_sweeper(g)   /* 9 */
#endif
  :: else
  fi
}

inline forget_if_empty(g) {    /* _forget_if_empty_locked */
  if
  :: alive[g] && !waiting[g] && !staging[g] && !pending[g] && !committed[g] && !failed[g] && !busy[g] -> end_life(g)
  :: else
  fi
}

inline let_go(g) {             /* _let_go_locked: the holder hands a life that died meanwhile to the sweeper */
  busy[g] = false;
#ifdef VARIANT_SWEEP_WHILE_BUSY
  skip;
#else
  if :: !alive[g] -> hand_to_sweeper(g) :: else fi;
#endif
  notify_writer()
}

inline unmark(j) {             /* _unmark_locked */
#ifdef VARIANT_COUNTER_BY_ID
  in_hand[request_of[life[j]] + 1]--
#else
  in_hand[life[j]]--
#endif
}

inline retry_sweep(g) {        /* _retry_sweeps_locked */
  if :: sweep_error[g] -> sweep_error[g] = false; hand_to_sweeper(g) :: else fi
}

inline note_call(r) {          /* for the proof: what was there when the cleanup was called */
  d_step {
    i = 1;
    do
    :: i < SIZE ->
       if :: state[i] != NONE && request_of[life[i]] == r -> ended_by_cleanup[i] = true :: else fi;
       i++
    :: else -> break
    od;
    i = 0
  }
}

inline end_request(r, mine) {  /* begin_cleanup, for one request: `mine` are the lives to wait for */
  note_call(r);
#ifdef VARIANT_COUNTER_BY_ID
  if :: writing != 0 && request_of[life[writing]] == r -> in_hand[r + 1]++ :: else fi;
#endif
  if :: life_of[r] != 0 -> g = life_of[r]; end_life(g) :: else fi;
  g = 1;
  do
  :: g < next_generation ->
     if
     :: !alive[g] && request_of[g] == r -> mine = mine | (1 << g); retry_sweep(g)
     :: else
     fi;
     g++
  :: else -> break
  od;
  g = 0
}

/* ---- the caller's side ------------------------------------------------------------------------------------------- */

#define has_room(me) (turns ? [eval(me)] && in_flight < LIMIT)   /* Room.is_there_for */

inline leave_turn(me, g) {     /* _leave_locked */
  turns ?? eval(me);
  waiting[g]--;
  forget_if_empty(g)
}

proctype Saver(byte me; byte saves) {
  byte r, g, j, d;
  do
  :: saves > 0 ->
     saves--;
     if :: r = X :: me == B -> r = Y fi;
     atomic {                                              /* _queue_up_locked */
       if
       :: closing -> goto next                             /* StoreClosedError */
       :: else ->
          if
          :: life_of[r] == 0 ->                            /* _life_locked */
             life_of[r] = next_generation; request_of[next_generation] = r; alive[next_generation] = true;
             next_generation++
          :: else
          fi;
          g = life_of[r]; waiting[g]++; turns ! me
       fi;
       if :: has_room(me) :: else -> goto wait fi;         /* room at once: under the same lock */
accept:
       j = next_sequence; next_sequence++;                 /* _accept_locked: invariant 6, charged before the copy */
       state[j] = STAGING; life[j] = g; staging[g]++; in_flight++; accepted++;
       leave_turn(me, g);
       printf("saver %d: save %d of %c is accepted, generation %d\n", me, j, letter(r), g);
       check()
     };
     goto copy;
wait:
     atomic {                                              /* _reserve_locked: until there is room, or time is up */
       if
       :: !closing && alive[g] && has_room(me) -> goto accept
       :: closing -> printf("saver %d: refused, the store is closing\n", me)
       :: !closing && !alive[g] -> printf("saver %d: cleaned up while it waited for room\n", me)
       :: !closing && alive[g] && !has_room(me) -> printf("saver %d: StoreFullError\n", me)   /* its time-out */
       fi;
       leave_turn(me, g);
       check();
       goto next
     };
copy:
     if                                                    /* the copy to host memory */
     :: atomic {                                           /* admit */
          staging[g]--;
          if
#ifdef VARIANT_ADMIT_IN_ANY_ORDER
          :: alive[g] && !writer_may_end ->
#else
          :: alive[g] && newest[g] < j && !writer_may_end ->
#endif
             if
             :: pending[g] != 0 ->
                d = pending[g]; replaced[d] = true;
                if :: state[d] == QUEUED -> cancel(d) :: else fi;   /* _drop_queued_locked */
                d = 0
             :: else
             fi;
             newest[g] = j; pending[g] = j; state[j] = QUEUED;
             printf("saver %d: save %d is queued, and readable\n", me, j)
          :: else ->
             given_up[j] = writer_may_end; replaced[j] = newest[g] > j;
             cancel(j); forget_if_empty(g);
             printf("saver %d: save %d is cancelled while it was staged\n", me, j)
          fi;
#ifndef VARIANT_NO_NOTIFY
          notify_writer();                                 /* _note_staged_locked */
#endif
          check()
        }
     :: atomic {                                           /* abandon: the copy did not work */
          faults > 0 -> faults--;
          staging[g]--;
          if :: alive[g] -> fail(j) :: else -> cancel(j) fi;
          forget_if_empty(g); notify_writer();
          printf("saver %d: the copy of save %d fails\n", me, j);
          check()
        }
     fi;
next:
     g = 0; j = 0; r = 0
  :: else -> break
  od;
  callers_done++
}

#ifdef VARIANT_MARK_AFTER_WAIT
inline note_seen(r) {
  d_step {
    i = 1;
    do
    :: i < SIZE -> if :: state[i] != NONE && request_of[life[i]] == r -> seen = seen | (1 << i) :: else fi; i++
    :: else -> break
    od;
    i = 0
  }
}
#endif

proctype Cleaner(byte calls) {
  byte g, mine, d;
  bool all;
#ifdef VARIANT_MARK_AFTER_WAIT
  byte seen;
#endif
  do
  :: calls > 0 ->
     calls--;
     atomic {                                              /* begin_cleanup, for cleanup_request(X) or cleanup_all() */
       if :: all = false; printf("cleaner: cleanup_request(X)\n") :: all = true; printf("cleaner: cleanup_all\n") fi;
#ifdef VARIANT_MARK_AFTER_WAIT                             /* waits first, and marks when nothing is in the making */
       seen = 0; note_seen(X); if :: all -> note_seen(Y) :: else fi;
     };
     atomic {
       if :: writing == 0 :: true -> goto timed_out fi;
#endif
       end_request(X, mine);
       if :: all -> end_request(Y, mine) :: else fi;
       notify_writer(); notify_sweeper();
       check()
     };
     if                                                    /* await_swept */
     :: all_swept(mine) ->
        atomic {
          printf("cleaner: clean\n");
          g = 1;
          do
          :: g < SIZE -> if :: mine & (1 << g) -> said_clean[g] = true :: else fi; g++
          :: else -> break
          od;
          check()
        }
     :: true -> printf("cleaner: its time is up\n")
     fi;
timed_out:
     skip;
#ifdef VARIANT_MARK_AFTER_WAIT
     atomic {
       d_step {
         i = 1;
         do :: i < SIZE -> if :: seen & (1 << i) -> ended_by_cleanup[i] = true :: else fi; i++ :: else -> break od;
         i = 0; seen = 0
       };
       printf("cleaner: returns\n"); check()
     };
#endif
     g = 0; mine = 0; all = false
  :: else -> break
  od;
  callers_done++
}


/* ---- the writer thread -------------------------------------------------------------------------------------------- */

#define claimable(j) (state[j] == QUEUED && !busy[life[j]])
#if JOBS == 2
#define nothing_to_claim (!claimable(1) && !claimable(2))
#elif JOBS == 3
#define nothing_to_claim (!claimable(1) && !claimable(2) && !claimable(3))
#else
#define nothing_to_claim (!claimable(1) && !claimable(2) && !claimable(3) && !claimable(4))
#endif

/* An operation of the disk: it works, it fails, or (HANG) it never comes back. */
#ifdef HANG
#define MAY_HANG if :: true :: hung = true; printf("the disk hangs\n"); end_hung: false fi
#else
#define MAY_HANG skip
#endif

proctype Writer() {
  byte j, g, earlier;
  do
  :: atomic {                                              /* claim: takes the job and its life's busy at once */
       do
       :: claimable(1) -> j = 1; break
       :: claimable(2) -> j = 2; break
#if JOBS > 2
       :: claimable(3) -> j = 3; break
#endif
#if JOBS > 3
       :: claimable(4) -> j = 4; break
#endif
       :: nothing_to_claim ->
          if
#ifdef VARIANT_LEAVE_AT_THE_FLAG
          :: closing -> goto ended
#else
          :: writer_may_end || (closing && accepted == n_committed + n_cancelled + n_failed) -> goto ended
#endif
          :: else -> writer_asleep = true; end_idle: !writer_asleep
          fi
       od;
       g = life[j];
#ifdef VARIANT_POP_BEFORE_BUSY
       state[j] = POPPED
     };
     atomic {
#endif
       state[j] = WRITING; busy[g] = true; on_disk[g] = true; writing = j;
       printf("writer: has save %d in hand\n", j);
       check()
     };
     if
     :: atomic {                                           /* _write_temporary, and the look before the rename */
          if
          :: current(j) -> temporary[j] = true
          :: else -> goto not_current                      /* read without the lock: it may be out of date at once */
          fi
        }
     :: atomic { faults > 0 -> faults--; printf("writer: the temporary file fails\n"); goto broken }
     fi;
     MAY_HANG;
     if
     :: atomic {                                           /* _make_generation, _put_in_place */
          directory[place(g)] = true; file[place(g)] = j; temporary[j] = false;
          printf("writer: renames the file of save %d into its place\n", j);
          check()
        }
     :: atomic { faults > 0 -> faults--; printf("writer: the rename fails\n"); goto broken }
     :: atomic {                                           /* durability="full": renamed, but the directory is not synced */
          faults > 0 -> faults--;
          directory[place(g)] = true; earlier = file[place(g)]; file[place(g)] = j; temporary[j] = false;
          printf("writer: renames the file of save %d, and can not sync it\n", j);
          check()
        };
        atomic { file[place(g)] = earlier; goto broken }   /* _put_back */
     fi;
     atomic {                                              /* commit: looks at the job once more, after the rename */
       if
#ifdef VARIANT_NO_CHECK_AFTER_RENAME
       :: true ->
          if :: !alive[g] -> unmark(j) :: else fi;
#else
       :: current(j) ->
#endif
          leave_pending(j); unlist(g);
          committed[g] = j; live_snapshots++; failed[g] = false;
          assert(!ended_by_cleanup[j]);                    /* no save is reported committed after it was forgotten */
          n_committed++; settle(j, COMMITTED); let_go(g);
          printf("writer: save %d is committed\n", j)
       :: else -> goto undo
       fi;
       check()
     };
     goto next;
undo:
     atomic { file[place(g)] = 0; printf("writer: undoes the file of save %d\n", j) };   /* _undo: late-rename rescue */
not_current:
     atomic {                                              /* finish_cancelled */
       cancel(j); unmark(j); let_go(g);
       printf("writer: save %d is cancelled\n", j);
       check()
     };
     goto next;
broken:
     atomic {                                              /* _end_in_writer_locked */
       temporary[j] = false;
       if
       :: alive[g] -> leave_pending(j); fail(j)
       :: else -> cancel(j); unmark(j)
       fi;
       let_go(g);
       printf("writer: save %d ends without a file\n", j);
       check()
     };
next:
     atomic { j = 0; g = 0; earlier = 0 }
  od;
ended:
  atomic { writer_gone = true; notify_sweeper(); printf("writer: ends\n") }   /* writer_ended */
}

/* ---- the sweeper thread: the only one that removes ---------------------------------------------------------------- */

#if JOBS == 2
#define nothing_to_sweep (!to_sweep[1] && !to_sweep[2])
#elif JOBS == 3
#define nothing_to_sweep (!to_sweep[1] && !to_sweep[2] && !to_sweep[3])
#else
#define nothing_to_sweep (!to_sweep[1] && !to_sweep[2] && !to_sweep[3] && !to_sweep[4])
#endif

bool remove_session;           /* Ending.remove */

inline first_of(lives, g) {
  g = 1;
  do :: !(lives & (1 << g)) -> g++ :: else -> break od;
  lives = lives & ~(1 << g)
}

proctype Sweeper() {
  byte g, lives;
  do
  :: atomic {                                              /* claim_dirt */
       do
       :: nothing_to_sweep ->
          if
          :: sweeper_may_end && writer_gone -> goto leave
          :: else -> sweeper_asleep = true; end_idle: !sweeper_asleep
          fi
       :: else -> break
       od;
       g = 1;
       do
       :: g < SIZE -> if :: to_sweep[g] -> to_sweep[g] = false; lives = lives | (1 << g) :: else fi; g++
       :: else -> break
       od;
       g = 0
     };
     do                                                    /* _sweep */
     :: lives != 0 ->
        MAY_HANG;
        if
        :: atomic {                                        /* _rename_aside */
             first_of(lives, g);
             in_trash[g] = directory[place(g)];
             directory[place(g)] = false; file[place(g)] = 0;
             printf("sweeper: what generation %d had is out of the way\n", g);
             check()
           };
           atomic {                                        /* swept */
             swept[g] = true;
             if :: !in_trash[g] -> trash_bytes = trash_bytes - doomed_bytes[g] :: else fi;
             g = 0;
             check()
           }
        :: atomic {                                        /* not_swept */
             faults > 0 -> faults--;
             first_of(lives, g);
             sweep_error[g] = true;
             printf("sweeper: generation %d will not go\n", g);
             g = 0
           }
        fi
     :: else -> break
     od;
     atomic {                                              /* _empty_trash, freed */
       g = 1;
       do
       :: g < SIZE ->
          if :: in_trash[g] -> in_trash[g] = false; trash_bytes = trash_bytes - doomed_bytes[g] :: else fi;
          g++
       :: else -> break
       od;
       g = 0; check()
     }
  od;
leave:
  atomic {                                                 /* _leave */
    if
    :: remove_session ->
       assert(writer_gone);
       g = 1;
       do :: g < SIZE -> directory[g] = false; file[g] = 0; g++ :: else -> break od;
       session_removed = true
    :: else
    fi;
    sweeper_gone = true;
    printf("sweeper: ends\n")
  }
}

/* ---- shutdown: Engine._end ----------------------------------------------------------------------------------------- */

proctype Shutdown() {
  byte g, mine, j, d;
  bool cleanup;
  if :: cleanup = false :: cleanup = true fi;
  atomic { closing = true; notify_writer(); printf("shutdown: no more saves\n") };               /* close */
  if
  :: cleanup ->
     atomic { end_request(X, mine); end_request(Y, mine); notify_writer(); notify_sweeper(); check() };
     if :: all_swept(mine) :: true fi
  :: else
  fi;
  if                                                       /* _end_writer: join, or the deadline */
  :: writer_gone
  :: !writer_gone ->
     atomic {                                              /* abandon_rest */
       writer_may_end = true;
       printf("shutdown: gives the rest up\n");
       j = 1;
       do
       :: j < SIZE ->
          if
          :: state[j] == QUEUED ->
             g = life[j]; given_up[j] = true; cancel(j);
             if                                            /* _read_from_hand_locked: invariant 7 */
             :: writing != 0 && life[writing] == g -> pending[g] = writing; newest[g] = writing
             :: else
             fi;
             forget_if_empty(g)
          :: else
          fi;
          j++
       :: else -> break
       od;
       g = 0; j = 0; notify_writer(); check()
     };
     if :: writer_gone :: true fi
  fi;
  atomic {                                                 /* end_sweeper(after_writer=True) */
    remove_session = cleanup; sweeper_may_end = true;
    g = 1;
    do :: g < SIZE -> retry_sweep(g); g++ :: else -> break od;
    g = 0; notify_sweeper()
  };
  if :: sweeper_gone :: true fi;
  atomic { shutdown_done = true; callers_done++; printf("shutdown: returns\n") }
}

/* ---- when nobody can go on any more -------------------------------------------------------------------------------- */

#ifdef NO_SHUTDOWN
#define CALLERS 3
#else
#define CALLERS 4
#endif

active proctype Judge() {
  byte j, k, left;
  bool too_late;
end:
  timeout ->                                               /* spin: true when every other thread is blocked or ended */
  atomic {
    assert(callers_done == CALLERS);                       /* also beside a disk that hangs, everybody has returned */
    if
    :: hung
    :: else ->
#ifndef NO_SHUTDOWN
       assert(writer_gone && sweeper_gone);
#endif
       assert(in_flight == 0 && writing == 0);             /* every accepted save has ended */
       j = 1;
       do
       :: j < SIZE ->
          assert(in_hand[j] == 0 && !temporary[j] && !busy[j]);
          /* no orphan: what is on disk is what the index names, but for what could not go, or was asked too late */
          too_late = to_sweep[j] && sweeper_gone;
          assert(alive[j] || swept[j] || !on_disk[j] || sweep_error[j] || session_removed || too_late);
          assert(session_removed || sweep_error[j] || too_late || file[place(j)] == committed[j]);
          assert(!in_trash[j]);
          /* the later accepted save of a key wins */
          k = j + 1;
          do
          :: k < SIZE ->
             assert(!(alive[life[j]] && committed[life[j]] == j && life[k] == life[j] && state[k] == COMMITTED));
             k++
          :: else -> break
          od;
          left = left + ((sweep_error[j] || too_late) && doomed_bytes[j]);
          j++
       :: else -> break
       od;
       assert(trash_bytes == left);                           /* counters return to zero, but for what will not go */
    fi
  }
}

init {
  atomic {
    run Writer(); run Sweeper();
    run Saver(A, SAVES_A); run Saver(B, SAVES_B);
    run Cleaner(CLEANUPS);
#ifndef NO_SHUTDOWN
    run Shutdown()
#endif
  }
}

/* ---- progress, with weak fairness: a thread that can go on some day does -------------------------------------------- */

#ifdef PROVE_SHUTDOWN
ltl shutdown_ends { <> shutdown_done }
#endif
#ifdef PROVE_SAVES
ltl saves_end { [] ((in_flight > 0) -> <> (in_flight == 0)) }
#endif
