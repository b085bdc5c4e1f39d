//! Several nodes keep snapshots of one projection in one store.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_take_snapshots_of_one_projection() {
    for (store, link, _dir) in links().await {
        let log: Arc<dyn EventStore> = Arc::new(link.clone());
        let others = link.beside();
        let trial = |batch| Trial { options: options().batch_size(batch), ..Trial::every(5) };
        let (one, two) = (trial(3).start(&link).await, trial(7).start(&others).await);
        let writers = Writers::start(&log, 3, 100, 3);
        let mut newest = 0;
        while newest < 300 {
            // The stored snapshot never becomes older.
            if let Some((_, snapshot)) = kept(&link).await {
                assert!(snapshot.version.get() >= newest, "{store}: {} after {newest}", snapshot.version);
                newest = snapshot.version.get();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        writers.done().await;
        for running in [&one, &two] {
            running.assert_exact(&link).await;
        }
        for link in [&link, &others] {
            assert_true(link, &Filter::all()).await;
        }
        one.stop().await;
        two.node.kill();
        let running = trial(3).start(&others).await;
        running.assert_exact(&others).await;
        assert_eq!(running.seen(), 0, "{store}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_snapshot_replaces_no_newer_one() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(50);
        let slow = link.beside();
        slow.shelf.stuck.store(true, Ordering::SeqCst);
        more(&link, 1, 0..50).await;
        let late = trial.start(&slow).await;
        late.assert_exact(&link).await;
        eventually("it is on its way", || slow.shelf.asked.load(Ordering::SeqCst) == 1).await;
        late.handle.pause().await.unwrap();
        more(&link, 1, 0..50).await;
        let running = trial.start(&link).await;
        running.handle.resume().await.unwrap();
        running.assert_exact(&link).await;
        running.stop().await;
        let newest = kept(&link).await.unwrap().1.version;
        slow.shelf.stuck.store(false, Ordering::SeqCst);
        eventually("it has come", || slow.shelf.saved.lock().unwrap().len() == 1).await;
        assert_eq!(kept(&link).await.unwrap().1.version, newest, "{store}");
        late.stop().await;
        assert!(kept(&link).await.unwrap().1.version >= newest, "{store}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_two_revisions_never_start_from_each_others() {
    for (store, link, _dir) in links().await {
        let log: Arc<dyn EventStore> = Arc::new(link.clone());
        let old = Trial::every(5);
        let new = Trial { revision: 2, ..old.clone() };
        let writers = Writers::start(&log, 2, 60, 3);
        let mut runs = vec![old.start(&link).await, new.start(&link).await];
        for n in 0..6 {
            let trial = if n % 2 == 0 { &old } else { &new };
            let running = std::mem::replace(&mut runs[n % 2], trial.start(&link).await);
            running.node.kill();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        writers.done().await;
        for running in runs {
            running.assert_exact(&link).await;
            running.stop().await;
        }
        assert!(!link.shelf.saved.lock().unwrap().is_empty(), "{store}");
        assert_true(&link, &Filter::all()).await;
    }
}
