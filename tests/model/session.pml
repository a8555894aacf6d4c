/* Processes that share a root: who owns a session directory, who may remove it, and what a death at any point leaves.
 *
 * Read the head of store.pml first. A directory is known by a number, as the kernel knows it by its inode; where it
 * stands is a fact of its own, since a rename moves it. Each directory gets one lock file at most, so that file has the
 * directory's number, and keeps it (and whoever holds it) also when its name is gone. A process that dies loses its locks
 * in the same moment: that is what `flock` promises, and what all of this rests on.
 *
 * Each VARIANT_... is a shortcut. `run.py` shows that each is refuted.
 */

#ifndef OWNERS
#define OWNERS 1           /* processes that open a store */
#endif
#ifndef RECLAIMERS
#define RECLAIMERS 2       /* stores that start beside them, and reclaim what dead ones have left */
#endif
#ifndef DEATHS
#define DEATHS 2
#endif
#ifndef VANDALS
#define VANDALS 1          /* how often somebody removes the directory of a live session, `rm -rf` */
#endif
#ifndef TRIES
#define TRIES 2            /* _ATTEMPTS: how often a maker tries, when others take what it makes */
#endif

#define PROCESSES (OWNERS + RECLAIMERS)
#define DIRECTORIES (OWNERS * (TRIES + VANDALS))
#define SIZE (DIRECTORIES + 1)                             /* counted from 1; 0 means none */

mtype = { NOWHERE, UNBORN, SESSION, ASIDE };               /* gone; .new-<random>; <session>; .dead-<random> */

/* ---- the disk ------------------------------------------------------------------------------------------------------ */

mtype stands[SIZE] = NOWHERE;
byte at[OWNERS + 1];       /* the directory that stands under the session name of a process */
bool record[SIZE];         /* owner.json is in it */
bool content[SIZE];        /* .tmp, .trash, snapshots */
bool named[SIZE];          /* owner.lock is in it */
byte holder[SIZE];         /* who holds the flock of that lock file, named or not */
byte made;                 /* directories so far */
byte remover[SIZE];        /* for the proof: who removes what is in it */

/* ---- the processes ------------------------------------------------------------------------------------------------- */

bool dead[PROCESSES + 1];
byte owned[OWNERS + 1];    /* the session that a living store believes to be its own */
byte deaths = DEATHS, vandals = VANDALS;

#define is_empty(d) (!record[d] && !content[d] && !named[d])
#define is_owned(d) (d != 0 && (owned[1] == d || owned[OWNERS] == d))

inline drop(d) { if :: d != 0 && holder[d] == me -> holder[d] = 0 :: else fi; d = 0 }   /* OwnerLock.release */

/* Removing what is in a directory, and it: _files.remove_tree with keep_last=owner.lock. It works on an open descriptor,
 * so a rename does not save the directory from it. Whoever does this is alone with it, and it is nobody's. */
inline may_remove(d) {
  assert(!is_owned(d));
  assert(holder[d] == me && (remover[d] == 0 || remover[d] == me || dead[remover[d]]));
  remover[d] = me
}
#ifdef VARIANT_LOCK_FILE_FIRST
inline remove_tree(d) {
  atomic { may_remove(d); named[d] = false; printf("process %d: removes the lock file of directory %d\n", me, d) };
  atomic { may_remove(d); record[d] = false; content[d] = false };
  atomic { stands[d] = NOWHERE; printf("process %d: directory %d is gone\n", me, d) }
}
#else
inline remove_tree(d) {
  atomic { may_remove(d); record[d] = false; printf("process %d: removes the record of directory %d\n", me, d) };
  atomic { may_remove(d); content[d] = false };
  atomic { may_remove(d); named[d] = false };
  atomic { if :: is_empty(d) -> stands[d] = NOWHERE; printf("process %d: directory %d is gone\n", me, d) :: else fi }
}
#endif

/* Half-removed, and its lock file is gone: that went last, so there is nothing that two could remove at once. */
inline remove_without_lock(d) {
  atomic {
    assert(!is_owned(d));
    assert(is_empty(d) || remover[d] == 0 || dead[remover[d]]);
    record[d] = false; content[d] = false;
    if :: is_empty(d) -> stands[d] = NOWHERE :: else fi;
    printf("process %d: removes directory %d, which has no lock file\n", me, d)
  }
}

/* ---- an owner: Session.open, a life, an end ------------------------------------------------------------------------ */

#ifdef VARIANT_VISIBLE_BEFORE_LOCK
#define BORN_AS SESSION
#else
#define BORN_AS UNBORN
#endif

/* _build: a session that nobody can see yet, its lock held; `d` is 0 if another process took it before that. */
inline build() {
  atomic {
    made++; d = made; stands[d] = BORN_AS;
#ifdef VARIANT_VISIBLE_BEFORE_LOCK
    at[me] = d;
#endif
    printf("process %d: makes directory %d\n", me, d)
  };
  atomic {                                                 /* OwnerLock.take: open_lock(create=True) */
    if :: stands[d] == BORN_AS -> named[d] = true :: else -> d = 0; goto built fi
  };
  atomic {                                                 /* lock, without waiting */
    if :: holder[d] == 0 -> holder[d] = me :: else -> d = 0; goto built fi;
    printf("process %d: has the lock of directory %d\n", me, d)
  };
#ifndef VARIANT_NO_SECOND_LOOK
  atomic {                                                 /* _same_file: does the path still name what was locked? */
    if :: stands[d] == BORN_AS && named[d] :: else -> drop(d); goto built fi
  };
#endif
  atomic {                                                 /* owner.json */
    if :: stands[d] == BORN_AS -> record[d] = true :: else -> drop(d); goto built fi
  };
  atomic {                                                 /* .tmp, .trash */
    if :: stands[d] == BORN_AS -> content[d] = true :: else -> drop(d); goto built fi
  }
}

proctype Owner(byte me) {
  byte d, before, tries;
  {
    skip;
again:
    tries++;
    build();
built:
    if
    :: d == 0 && before == 0 && tries < TRIES -> goto again
    :: d == 0 && before == 0 && tries >= TRIES -> printf("process %d: RootError\n", me); goto over
    :: d == 0 && before != 0 -> d = before; before = 0; goto ending   /* it goes on without a directory */
    :: else
    fi;
    atomic {                                               /* Session._name, _make_again: visible from here on */
      assert(stands[d] == BORN_AS && (at[me] == 0 || at[me] == d));
      stands[d] = SESSION; at[me] = d; owned[me] = d;
      printf("process %d: has opened its session, directory %d\n", me, d)
    };
    atomic { drop(before) };                               /* of the directory that it lost: given up after that */
    if                                                     /* Session.mend: somebody removed all of it */
    :: at[me] == 0 && made < DIRECTORIES -> before = d; d = 0; goto again
    :: true
    fi;
ending:
    if
    :: atomic { printf("process %d: leaves its files\n", me); owned[me] = 0; drop(d) }   /* shutdown() */
    :: atomic {                                            /* shutdown(cleanup=True): Session.remove */
         owned[me] = 0;
         if :: at[me] == d -> stands[d] = ASIDE; at[me] = 0 :: else -> drop(d); goto over fi;
         printf("process %d: removes its session\n", me)
       };
       remove_tree(d);
       atomic { drop(d) }
    :: true                                                /* it lives on */
    fi;
over:
    skip
  } unless { dead[me] };
}

/* ---- a reclaimer: _session.reclaim, once through the root ------------------------------------------------------------ */

proctype Reclaimer(byte me) {
  byte q, d, target;
  {
    /* dead_sessions: by the name of a session; `d` is what was locked, `target` what then stands under the name */
    q = 1;
    do
    :: q <= OWNERS ->
#if defined(VARIANT_BY_AGE)                                /* old enough, by the clock: no lock is asked */
       if :: at[q] != 0 :: true -> goto next_session fi;
#elif defined(VARIANT_PID_IS_PROOF)                        /* no such pid to be seen: dead. The last process sees no other's */
       if :: at[q] != 0 && (dead[q] || me == PROCESSES) :: else -> goto next_session fi;
#else
       atomic {                                            /* read_record, and OwnerLock.take: open_lock(create=False) */
         if :: at[q] != 0 && record[at[q]] && named[at[q]] -> d = at[q] :: else -> goto next_session fi
       };
       atomic {
         if :: holder[d] == 0 -> holder[d] = me :: else -> d = 0; goto next_session fi;
         printf("process %d: has the lock of directory %d\n", me, d)
       };
#ifndef VARIANT_NO_SECOND_LOOK
       atomic { if :: at[q] == d && named[d] :: else -> drop(d); goto next_session fi };   /* _same_file */
#endif
#endif
       atomic {                                            /* _delete: aside first, by name */
         target = at[q];
         if :: target == 0 -> drop(d); goto next_session :: else fi;
         printf("process %d: takes directory %d for a leftover\n", me, target);
         assert(!is_owned(target));                        /* never the session of a store that lives */
#ifndef VARIANT_DELETE_IN_PLACE
         stands[target] = ASIDE; at[q] = 0
#endif
       };
       remove_tree(target);
#ifdef VARIANT_DELETE_IN_PLACE
       atomic { if :: stands[target] == NOWHERE && at[q] == target -> at[q] = 0 :: else fi };
#endif
       atomic { drop(d); target = 0 };
next_session:
       q++
    :: else -> break
    od;
    /* _reclaim_unfinished: what crashes left half-made or half-removed */
    q = 1;
    do
    :: q < SIZE ->
       atomic {
         if
         :: (stands[q] == UNBORN || stands[q] == ASIDE) && is_empty(q) ->   /* empty: goes at once, its maker tries again */
            stands[q] = NOWHERE; printf("process %d: removes the empty directory %d\n", me, q);
            goto next_directory
         :: (stands[q] == UNBORN || stands[q] == ASIDE) && !is_empty(q) -> skip
         :: else -> goto next_directory
         fi
       };
       atomic {                                            /* OwnerLock.take: open_lock(create=False) */
         if
         :: (stands[q] == UNBORN || stands[q] == ASIDE) && named[q] -> d = q
         :: (stands[q] == UNBORN || stands[q] == ASIDE) && !named[q] -> goto lockless
         :: else -> goto next_directory
         fi
       };
       atomic {
         if :: holder[d] == 0 -> holder[d] = me :: else -> d = 0; goto next_directory fi;
         printf("process %d: has the lock of directory %d\n", me, d)
       };
       atomic {                                            /* _same_file; without it, the path is looked up once more below */
#ifndef VARIANT_NO_SECOND_LOOK
         if :: named[d] :: else -> drop(d); goto next_directory fi;
#endif
         if :: stands[d] == UNBORN || stands[d] == ASIDE :: else -> drop(d); goto next_directory fi
       };
       remove_tree(d);
       atomic { drop(d) };
       goto next_directory;
lockless:
       remove_without_lock(q);
next_directory:
       q++
    :: else -> break
    od
  } unless { dead[me] };
}

/* ---- the world -------------------------------------------------------------------------------------------------------- */

/* kill -9, at any point; the kernel drops the locks of the dead. A store that has come to rest may die too. */
active proctype Death() {
  byte p, d;
  do
  :: deaths > 0 ->
     atomic {
       deaths--;
       p = 1;
       do :: p < PROCESSES -> p++ :: true -> break od;
       dead[p] = true;
       if :: p <= OWNERS -> owned[p] = 0 :: else fi;
       d = 1;
       do :: d < SIZE -> if :: holder[d] == p -> holder[d] = 0 :: else fi; d++ :: else -> break od;
       printf("process %d: dies\n", p);
       p = 0; d = 0
     }
  :: true -> break
  od
}

/* rm -rf of the directory of a living session: none of ours does that, but it must not make us harm anybody. */
active proctype Vandal() {
  byte q, d;
  do
  :: vandals > 0 ->
     atomic {
       vandals--;
       q = 1;
       do :: q < OWNERS -> q++ :: true -> break od;
       d = at[q];
       if
       :: d != 0 && owned[q] == d ->
          stands[d] = NOWHERE; at[q] = 0; record[d] = false; content[d] = false; named[d] = false;
          printf("vandal: removes directory %d\n", d)
       :: else
       fi;
       q = 0; d = 0
     }
  :: true -> break
  od
}

/* When all have ended or died: whatever has no living owner can be removed by the next store that starts. */
active proctype Judge() {
  byte d;
end:
  timeout ->
  atomic {
    d = 1;
    do
    :: d < SIZE ->
       if
       :: is_owned(d) ->
          assert(stands[d] == NOWHERE || (stands[d] == SESSION && named[d] && record[d] && holder[d] != 0))
       :: !is_owned(d) && stands[d] == SESSION ->
          assert(record[d] && named[d] && holder[d] == 0)
       :: !is_owned(d) && (stands[d] == UNBORN || stands[d] == ASIDE) ->
          assert(!named[d] || holder[d] == 0)
       :: else
       fi;
       d++
    :: else -> break
    od
  }
}

init {
  byte p = 1;
  atomic {
    do :: p <= OWNERS -> run Owner(p); p++ :: else -> break od;
    do :: p <= PROCESSES -> run Reclaimer(p); p++ :: else -> break od
  }
}
