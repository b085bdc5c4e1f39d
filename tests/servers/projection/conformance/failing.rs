//! Events that cannot be applied.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use storied::projection::{ControlError, FailurePolicy, InMemory, ProjectionState, UnknownNames, WaitError};
use storied::{EventName, Filter, Metadata, NewEvent, Position, ProjectionHandle, PublisherState};

use super::place::Place;
use super::{Bus, Scene};
use crate::projection::fixtures::*;

pub async fn stops_before_a_poison_event<P: Place>(scene: Scene<P>) {
    scene.append(0, 1..=10).await;
    let all = log(&scene.store, &Filter::all()).await;
    let broken = Arc::new(AtomicBool::new(true));
    let node = scene.node().await;
    let writes = || scene.writes("stops").hook(poison(all[5].get(), &broken));
    let handle = scene.start(&node, writes(), scene.options()).await;
    let error = handle.caught_up_to_within(all[9], PATIENCE).await.unwrap_err();
    assert!(matches!(&error, WaitError::Failed { error, .. } if error.contains("poison")), "{error}");
    let status = handle.status();
    assert_eq!((status.state, status.position), (ProjectionState::Failed, all[4]));
    // The events before it are applied.
    handle.caught_up_to(all[4]).await.unwrap();
    assert_eq!(scene.place.seen("stops").await, all[..5]);
    handle.resume().await.unwrap();
    reach(&handle, ProjectionState::Failed).await;
    broken.store(false, Ordering::SeqCst);
    handle.resume().await.unwrap();
    catch_up(&handle, all[9]).await;
    scene.assert_exact("stops", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}

pub async fn parks_retries_and_discards<P: Place>(scene: Scene<P>) {
    scene.append(0, 1..=10).await;
    let all = log(&scene.store, &Filter::all()).await;
    let (third, seventh) = (all[2], all[6]);
    let broken = Arc::new(AtomicBool::new(true));
    let both = {
        let broken = broken.clone();
        hook(move |event| {
            let poisonous = [third, seventh].contains(&event.position) && broken.load(Ordering::SeqCst);
            if poisonous { Err("poison".into()) } else { Ok(()) }
        })
    };
    let node = scene.node().await;
    let options = scene.options().on_failure(FailurePolicy::Park).max_attempts(2);
    let handle = scene.start(&node, scene.writes("parks").hook(both), options).await;
    catch_up(&handle, all[9]).await;
    let parked = handle.parked(10).await.unwrap();
    assert_eq!(parked.iter().map(|event| event.position).collect::<Vec<_>>(), [third, seventh]);
    assert_eq!((parked[0].attempts, parked[0].error.as_str()), (2, "poison"));
    assert_eq!(handle.parked(1).await.unwrap().len(), 1);
    assert_eq!(handle.status().events_parked, 2);
    let mut rest = all.clone();
    rest.retain(|position| ![third, seventh].contains(position));
    assert_eq!(scene.place.seen("parks").await, rest);

    let refused = handle.retry_parked(third).await.unwrap_err();
    assert!(matches!(refused, ControlError::Refused { .. }), "{refused}");
    let unknown = handle.retry_parked(all[3]).await.unwrap_err();
    assert!(matches!(unknown, ControlError::NotParked { .. }), "{unknown}");
    assert_eq!(handle.parked(10).await.unwrap().len(), 2, "still parked");
    broken.store(false, Ordering::SeqCst);
    handle.retry_parked(third).await.unwrap();
    handle.discard_parked(seventh).await.unwrap();
    assert!(handle.parked(10).await.unwrap().is_empty());
    for gone in [handle.retry_parked(third).await, handle.discard_parked(seventh).await] {
        assert!(matches!(gone, Err(ControlError::NotParked { .. })), "{gone:?}");
    }
    rest.push(third);
    assert_eq!(scene.place.seen("parks").await, rest);
    node.stop(PATIENCE).await.unwrap();
}

/// A filter by names receives no other names.
///
/// A filter by category receives all names, and unknown names are tried once.
pub async fn skips_unknown_names<P: Place>(scene: Scene<P>) {
    scene.append(0, [1]).await;
    let thing = NewEvent::encode(&Thing::Never, scene.store.info().codec, &Metadata::default()).unwrap();
    let unknown = NewEvent { name: EventName::new("thing.unheard_of").unwrap(), ..thing };
    let strange = append_raw(&scene.store, 0, vec![unknown]).await;
    let head = scene.append(0, [2]).await;
    let named = Filter::variants::<Thing>(["even", "odd"]);
    let (options, node) = (scene.options(), scene.node().await);
    let mut handles = Vec::new();
    for (name, filter, options) in [
        ("named", named, options.clone()),
        ("passing", Filter::of::<Thing>(), options.clone().unknown_names(UnknownNames::Skip)),
        ("parking", Filter::of::<Thing>(), options.clone().on_failure(FailurePolicy::Park)),
        ("stopping", Filter::of::<Thing>(), options),
    ] {
        // The projection decodes, or its `apply` does: an error counts the same.
        handles.push(match name {
            "parking" => {
                let decodes = hook(|event| Ok(event.decode::<Thing>().map(drop)?));
                scene.start(&node, scene.writes(name).filter(filter).hook(decodes), options).await
            }
            _ => scene.start(&node, scene.writes(name).decoded::<Thing>().filter(filter), options).await,
        });
    }
    let [named, passing, parking, stopping] = &handles[..] else { unreachable!() };
    for handle in [named, passing, parking] {
        catch_up(handle, head).await;
        assert_eq!(scene.place.seen(handle.name()).await.len(), 2, "{}", handle.name());
    }
    let skipped = |handle: &ProjectionHandle| handle.status().events_skipped;
    assert_eq!((skipped(named), skipped(passing), skipped(parking)), (0, 1, 0));
    assert!(passing.parked(10).await.unwrap().is_empty());
    let parked = parking.parked(10).await.unwrap();
    assert_eq!((parked.len(), parked[0].position, parked[0].attempts), (1, strange, 1), "{parked:?}");
    assert!(parked[0].error.contains("unheard_of"), "{}", parked[0].error);
    reach(stopping, ProjectionState::Failed).await;
    assert!(stopping.status().last_error.is_some_and(|error| error.contains("unheard_of")));
    node.stop(PATIENCE).await.unwrap();
}

/// One projection has failed, one hangs; the others are not affected.
pub async fn does_not_affect_other_projections<P: Place>(scene: Scene<P>) {
    let node = scene.node().await;
    let first = scene.append(0, [1]).await;
    let broken = Arc::new(AtomicBool::new(true));
    let gate = Gate::closed();
    let failed = scene.writes("failed").hook(poison(first.get(), &broken));
    let failed = scene.start(&node, failed, scene.options().max_attempts(1)).await;
    // In memory, where it holds no database that others need.
    let hangs = recorder("hangs").hook(gate.hook());
    let hung = hangs.seen.clone();
    let hangs = node.projection(hangs, InMemory::new(), options()).await;
    let well = scene.start(&node, scene.writes("well"), scene.options()).await;
    reach(&failed, ProjectionState::Failed).await;
    gate.reached().await;
    let mut last = Position::START;
    for n in 0..30 {
        last = scene.append(n % 3, [n]).await;
        catch_up(&well, last).await;
    }
    // Projections read the store: the publisher may lag.
    let state = if scene.bus == Bus::None { PublisherState::Idle } else { PublisherState::Publishing };
    eventually("it publishes, if there is a bus", || node.publisher().state == state).await;
    assert!(scene.place.seen("failed").await.is_empty() && hung.positions().is_empty());
    gate.open();
    catch_up(&hangs, last).await;
    assert_eq!(failed.status().state, ProjectionState::Failed);
    assert_eq!(hung.positions(), log(&scene.store, &Filter::all()).await);
    scene.assert_exact("well", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}
